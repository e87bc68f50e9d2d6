"""What one process does of a study: take a piece that nobody has, do it, put it in its place, and so on to the end."""

import contextlib
import gc
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from clustermim.errors import ClusterMIMError, ResourceError, Stopped
from clustermim.lease import Lease
from clustermim.runs import environment_facts
from clustermim.studies.doing import Bench, do_piece, write_predictions
from clustermim.studies.folder import SETTLED
from clustermim.studies.pieces import Piece
from clustermim.studies.states import states_of
from clustermim.training.launch import StopRequest

_REPEATED = frozenset({"score", "select", "probe"})
"""Kinds of pieces that a request to stop breaks off: they have no checkpoint and are repeated from their beginning."""

_PATIENCE = 0.5  # seconds between two looks, while others are at work
_LITTLE_SPACE = 64 * 2**20  # bytes: a piece that fails on a disk as full as this says nothing about the piece


def work(
    bench: Bench, stop: StopRequest, *, capture: bool = False, tell: Callable[[str], None] = lambda told: None
) -> None:
    """Do pieces until all are settled, by this process or by others.

    Parameters
    ----------
    bench
        The study, the images, the device.
    stop
        Looked at between pieces; fits and trainings look for themselves, and pieces of the other kinds are broken off.
    capture
        Write what a piece prints to its log instead of the terminal.
    tell
        Told a line about each piece that ends.

    Raises
    ------
    Stopped
        On request; everything can be continued.
    ResourceError
        The disk is full.
    """
    facts = environment_facts()
    while True:
        if stop.reason is not None:
            raise Stopped(f"Stopped {stop.reason}; the same command with --resume continues.")
        states = states_of(bench.plan, bench.folder)
        if all(state in SETTLED for state in states.values()):
            return
        # A piece that counts as running may have lost its process: who tries to claim it finds out.
        open_ = [i for i, s in states.items() if s == "ready"] + [i for i, s in states.items() if s == "running"]
        for identity in open_:
            with bench.folder.claim(bench.plan.pieces[identity]) as lease:
                if lease is not None:
                    _do(bench.plan.pieces[identity], bench, stop, lease, facts, capture, tell)
                    break
        else:
            time.sleep(_PATIENCE)


def _do(
    piece: Piece,
    bench: Bench,
    stop: StopRequest,
    lease: Lease,
    facts: object,
    capture: bool,
    tell: Callable[[str], None],
) -> None:
    folder = bench.folder
    place = folder.begin(piece.id)
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    seconds = place / "seconds.txt"
    do = partial(do_piece, piece, bench, place)
    before = float(seconds.read_text()) if seconds.exists() else 0.0
    try:
        with _printed_to(place / "log.txt" if capture else None):
            result = stop.breaking_off(do) if piece.kind in _REPEATED else do()
            taken = before + time.monotonic() - began
            record = {"kind": piece.kind, "name": piece.name, "result": result, "seconds": round(taken, 3)}
            seconds.unlink(missing_ok=True)
            folder.finish(
                piece.id, record | {"started": started, "threads": torch.get_num_threads()} | {"made_by": facts}, lease
            )
    except (Stopped, KeyboardInterrupt):
        if piece.kind not in _REPEATED:
            seconds.write_text(f"{before + time.monotonic() - began:.3f}")
        folder.note("stopped", piece.id)
        raise
    except Exception as error:
        if isinstance(error, ResourceError | OSError) and shutil.disk_usage(folder.path).free < _LITTLE_SPACE:
            raise ResourceError(
                f"The disk of {folder.path} is full. Free some space, then repeat the command with --resume: "
                "nothing that is finished is lost."
            ) from error
        lease.confirm()
        if not isinstance(error, ClusterMIMError):
            (place / "log.txt").open("a").write(traceback.format_exc())
        folder.fail(piece.id, error)
        tell(f"failed: {piece.kind} of {piece.name}: {' '.join(str(error).split())}")
    else:
        if piece.kind == "predict":
            write_predictions(bench.plan, folder)
        tell(f"{piece.kind} of {piece.name}: {taken:.1f} s")
    if torch.cuda.is_available():  # what one piece held on the device, the next may need
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _printed_to(file: Path | None) -> Iterator[None]:
    """Send what this process prints, and what its libraries do, to a file meanwhile."""
    if file is None:
        yield
        return
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        with file.open("a") as target:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number in kept:
                os.dup2(target.fileno(), number)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
