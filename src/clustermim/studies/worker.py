"""A process of a study, started by `supervising`: `python -m clustermim.studies.worker RECIPE FOLDER ...`.

It ends by itself when all pieces are settled, on SIGTERM, and when the process that started it is gone: its standard
input then comes to an end.
"""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

import yaml

from clustermim.errors import ClusterMIMError
from clustermim.heap import keep_freed_memory


def end_with_the_starter() -> None:
    """Stop politely when nobody is left to stop this process."""

    def watch() -> None:
        # Not through sys.stdin: who reads from that holds its lock, and a process forked meanwhile, such as one that
        # reads images, closes it first of all and would wait for the lock forever.
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Work on a study and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, help="the recipe as `supervising` wrote it")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--max-minutes", type=float)
    given = parser.parse_args()
    keep_freed_memory()

    import time

    import torch

    from clustermim.studies.doing import Bench
    from clustermim.studies.folder import StudyFolder
    from clustermim.studies.opening import Sources
    from clustermim.studies.planning import make_plan
    from clustermim.studies.recipe import parse_recipe
    from clustermim.studies.working import work
    from clustermim.training.launch import listen_for_stop

    if given.threads:
        torch.set_num_threads(given.threads)
    began = time.monotonic()

    def left() -> float | None:
        return None if given.max_minutes is None else max(0.0, given.max_minutes - (time.monotonic() - began) / 60)

    try:
        with listen_for_stop(given.max_minutes) as stop:
            end_with_the_starter()
            recipe = parse_recipe(yaml.safe_load(given.recipe.read_text()))
            sources = Sources(recipe.data)
            bench = Bench(
                plan=make_plan(recipe, sources),
                folder=StudyFolder(given.folder),
                sources=sources,
                device=given.device,
                workers=given.workers,
                minutes_left=left,
            )
            work(bench, stop, capture=True)
    except ClusterMIMError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
