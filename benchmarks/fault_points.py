"""Points of a pretraining at which `faults.py` can let something happen: patched in its own processes only.

A point is a function of the package, the standard library or torch; a fault strikes at its n-th call.
"""

import errno
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

KILL, ENOSPC, EROFS, NAN, MEMORY = "SIGKILL", "ENOSPC", "EROFS", "NaN", "out of memory"


def strike(what: str) -> None:
    """End this process, or raise what the system would."""
    if what == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == MEMORY:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    number = getattr(errno, what)
    raise OSError(number, os.strerror(number))


def _checkpoint_bytes(hit: Callable[[], bool], what: str) -> None:
    """Half of a block of a checkpoint is written."""
    from clustermim.training import checkpoints

    write: Any = checkpoints._Hashing.write

    def broken(self: Any, data: Any) -> int:
        if hit():
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()
            strike(what)
        return int(write(self, data))

    checkpoints._Hashing.write = broken  # type: ignore[method-assign]


def _before(owner: Any, name: str) -> Callable[[Callable[[], bool], str], None]:
    """Just before a function is called."""

    def install(hit: Callable[[], bool], what: str) -> None:
        whole = getattr(owner, name)

        def broken(*arguments: Any, **options: Any) -> Any:
            if hit():
                strike(what)
            return whole(*arguments, **options)

        setattr(owner, name, broken)

    return install


def _metrics_row(hit: Callable[[], bool], what: str) -> None:
    """Half of a row of metrics is written."""
    from clustermim.runs import RunDirectory

    whole: Any = RunDirectory.append_metrics

    def broken(self: Any, row: Any) -> None:
        if hit():
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(dict(row))[:25])
            strike(what)
        whole(self, row)

    RunDirectory.append_metrics = broken  # type: ignore[method-assign]


def _final_weights(hit: Callable[[], bool], what: str) -> None:
    """Half of the final weights are written."""
    import safetensors.torch

    whole = safetensors.torch.save_file

    def broken(tensors: Any, path: Path, **options: Any) -> None:
        whole(tensors, path, **options)
        if hit():
            os.truncate(path, Path(path).stat().st_size // 2)
            strike(what)

    safetensors.torch.save_file = broken


def _loss(hit: Callable[[], bool], what: str) -> None:
    """The loss of a step becomes NaN, or computing it takes too much memory."""
    from clustermim.mim import pretraining

    whole = pretraining.masked_loss

    def broken(*arguments: Any, **options: Any) -> Any:
        found = whole(*arguments, **options)
        if not hit():
            return found
        if what != NAN:
            strike(what)
        return found._replace(loss=found.loss * float("nan"))

    pretraining.masked_loss = broken


POINTS: dict[str, Callable[[Callable[[], bool], str], None]] = {
    "half a checkpoint": _checkpoint_bytes,
    "before fsync": _before(os, "fsync"),
    "before a rename": _before(Path, "replace"),
    "before a removal": _before(Path, "unlink"),
    "half a row of metrics": _metrics_row,
    "half the final weights": _final_weights,
    "loss": _loss,
}
"""Where a fault may strike; `count` says how often a run passes each."""


def install(point: str, call: int, what: str) -> None:
    """Let `what` happen at the `call`-th passing (from 1) of `point`, once."""
    passed = itertools.count(1)
    POINTS[point](lambda: next(passed) == call, what)


def count() -> dict[str, int]:
    """How often this process passes each point, from now on."""
    passed = dict.fromkeys(POINTS, 0)

    def counting(point: str) -> Callable[[], bool]:
        def hit() -> bool:
            passed[point] += 1
            return False

        return hit

    for point, put in POINTS.items():
        put(counting(point), KILL)
    return passed
