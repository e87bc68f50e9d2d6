"""How many images each shard has: counted once, and remembered for files that have not changed since."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from clustermim.data.remembering import cache_file, keep

Count = tuple[int, str | None]
"""Images of a shard, and what is wrong with it, if anything."""

_WORTH_A_BAR = 100  # files


def counted(files: Sequence[Path], what: str, count: Callable[[Path], Count]) -> list[Count]:
    """The images of each file, by `count` or from memory.

    Parameters
    ----------
    files
        All there.
    what
        Tells apart different ways of counting the same files.
    count
        Looks into one file.
    """
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    kept = cache_file("shards", [what, facts], ".json")
    with contextlib.suppress(OSError, ValueError):
        return [(int(number), problem) for number, problem in json.loads(kept.read_text())]
    shown = track(
        files,
        f"counting the images of {len(files)} shards, once",
        console=Console(stderr=True),
        transient=True,
        disable=len(files) < _WORTH_A_BAR,
    )
    found = [count(file) for file in shown]
    keep(kept, json.dumps(found))
    return found
