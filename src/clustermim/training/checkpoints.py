"""Checkpoints that survive a kill at any moment: whole or absent, each with a checksum, the last two kept.

The checksum stands in the file's name (`step-00000500-1f0c9a...pt`, the convention of torch.hub), so that weights and
checksum cannot disagree through a kill between two writes.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from clustermim.errors import InputError
from clustermim.runs import atomic_save, unwritable

_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")
_EVERY = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|)")


class Checkpoints:
    """The checkpoints of one run.

    Parameters
    ----------
    folder
        Where they stand; made when the first is written.
    keep
        How many of the newest to keep. Two, so that a damaged last one costs an interval, not the run.
    warn
        Told in words about every checkpoint that had to be skipped.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 2, warn: Callable[[str], None] = lambda message: None
    ) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self._warn = warn

    def paths(self) -> list[Path]:
        """The checkpoints that stand in the folder, newest first; nothing is said of their health."""
        found = [path for path in self.folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of, reverse=True)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `step`, then drop the oldest beyond `keep`.

        Raises
        ------
        ResourceError
            It could not be written; the checkpoints before it are untouched.
        """
        digest = hashlib.sha256()

        def write(path: Path) -> None:
            with path.open("wb") as file:
                torch.save(state, cast(IO[bytes], _Hashing(file, digest)))  # write and flush are all it needs

        # Without a checksum in its name a file does not count, so a kill between the two renames loses nothing.
        unnamed = self.folder / f"step-{step:08d}.pt"
        atomic_save(unnamed, write)
        path = unnamed.with_name(f"step-{step:08d}-{digest.hexdigest()[:16]}.pt")
        try:
            unnamed.replace(path)
        except OSError as error:
            raise unwritable(path, error.strerror or error) from error
        again = [p for p in self.paths() if p != path and _step_of(p) == step]  # the same step, before a resume
        for old in again + [p for p in self.paths() if p not in again][self.keep :]:
            with contextlib.suppress(OSError):  # one too many harms nobody
                old.unlink()
        return path

    def load_latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that is whole, as (step, state on the CPU), or None when there is none.

        A torn or altered file fails its checksum; it is skipped for the one before, and `warn` is told. Tensors only
        are unpickled (`weights_only`), so a file that somebody else made cannot run code.
        """
        for leftover in [*self.folder.glob(".partial-*"), *self.folder.glob("step-????????.pt")]:
            with contextlib.suppress(OSError):
                leftover.unlink()  # of a process that was killed while it wrote
        paths = self.paths()
        for place, path in enumerate(paths):
            match = _NAME.fullmatch(path.name)
            assert match is not None  # paths
            why = "its checksum does not fit"
            try:
                with path.open("rb") as file:
                    whole = hashlib.file_digest(file, "sha256").hexdigest()[:16] == match[2]
            except OSError as error:
                whole, why = False, error.strerror or str(error)
            if whole:
                return int(match[1]), torch.load(path, map_location="cpu", weights_only=True)
            instead = (
                f"going back to the one before, of step {_step_of(paths[place + 1])}"
                if place + 1 < len(paths)
                else "none is left, so training begins anew"
            )
            self._warn(f"checkpoint {path.name} is damaged ({why}); {instead}.")
        return None


class _Hashing:
    """A file that hashes what passes through, so that the checkpoint is not read again for its checksum."""

    def __init__(self, file: IO[bytes], digest: Any) -> None:
        self._file, self._digest = file, digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


@dataclass(frozen=True, kw_only=True)
class Interval:
    """How often to do something: every so many steps, or every so many seconds; just one of the two is set."""

    steps: int | None = None
    seconds: float | None = None


def parse_interval(text: str | int) -> Interval:
    """Read `500` as steps, and `30s`, `10m`, `2h` as time.

    Raises
    ------
    InputError
        It is neither, or it is zero.
    """
    match = _EVERY.fullmatch(str(text).strip().lower())
    number = float(match[1]) if match else 0.0
    if match is None or number <= 0 or (not match[2] and not number.is_integer()):
        raise InputError(
            f"--checkpoint-every {text!r} is neither a number of steps nor a time. Write 500 for steps, "
            "or 30s, 10m, 2h for seconds, minutes, hours."
        )
    if not match[2]:
        return Interval(steps=int(number))
    return Interval(seconds=number * {"s": 1, "m": 60, "h": 3600}[match[2]])


class Due:
    """Says when an `Interval` has passed since the last `reset`."""

    def __init__(self, interval: Interval, step: int = 0) -> None:
        self._interval = interval
        self.reset(step)

    def reset(self, step: int) -> None:
        """Count from here."""
        self._step, self._time = step, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time. By steps it is due at multiples, wherever a resumed run began."""
        if self._interval.steps is not None:
            return step > self._step and step % self._interval.steps == 0
        return time.monotonic() - self._time >= (self._interval.seconds or 0.0)
