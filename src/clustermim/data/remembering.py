"""What was found out about files, kept in the user's cache for as long as the files stay as they are."""

import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from clustermim.errors import ResourceError
from clustermim.runs import atomic_write

WORTH_KEEPING = 500
"""Images below which looking again takes no time worth a file."""

_FORMAT = 1
_TORN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

Moments = dict[int, tuple[np.ndarray, np.ndarray]]


def cache_file(kind: str, facts: Any, suffix: str) -> Path:
    """Where the user's cache keeps what was found out about `facts`: below $XDG_CACHE_HOME, or ~/.cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "clustermim" / kind / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}{suffix}"


def keep(path: Path, content: bytes | str) -> None:
    """Write a file of the cache. A full or read-only home costs finding it out again, no more."""
    with contextlib.suppress(OSError, ResourceError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)


def state_of(files: Sequence[Path]) -> str | None:
    """A fingerprint of files by place, size and times of change; None where one cannot be asked."""
    digest = hashlib.sha256()
    try:
        for file in files:
            facts = file.stat()
            line = f"{file}\0{facts.st_size}\0{facts.st_mtime_ns}\0{facts.st_ctime_ns}\0"
            digest.update(line.encode(errors="surrogateescape"))
    except OSError:
        return None
    return digest.hexdigest()


class LooksKept:
    """Shapes and moments of the images of one collection, on disk, for one state of its files.

    A collection has one file, which a later state of it replaces. Only good images are kept: what was broken may have
    been out of reach for a moment, and is looked at again.

    Parameters
    ----------
    name
        Of the collection.
    how
        Whatever else decides what is found.
    state
        Fingerprint of the files now.
    """

    def __init__(self, name: str, how: object, state: str) -> None:
        self.state = state
        facts = [_FORMAT, PIL.__version__, str(Path(name).absolute()), repr(how)]
        self.path = cache_file("looks", facts, ".npz")

    def read(self, count: int) -> tuple[np.ndarray, Moments] | None:
        """Shapes (n, 3) and moments of what is known of `count` images; None: nothing, or of another state."""
        with contextlib.suppress(*_TORN), np.load(self.path, allow_pickle=False) as kept:
            if str(kept["state"]) == self.state and kept["shapes"].shape == (count, 3):
                ends = np.cumsum(2 * kept["channels"])
                halves = [part.reshape(2, -1) for part in np.split(kept["values"], ends[:-1])]
                rows = kept["rows"].tolist()
                return kept["shapes"], {row: (mean, square) for row, (mean, square) in zip(rows, halves, strict=True)}
        return None

    def write(self, shapes: np.ndarray, moments: Moments) -> None:
        """Keep them, where the cache can be written."""
        held = io.BytesIO()
        values = [value for pair in moments.values() for value in pair]
        np.savez(
            held,
            state=self.state,
            shapes=shapes,
            rows=np.array(list(moments), dtype=np.int64),
            channels=np.array([len(mean) for mean, _ in moments.values()], dtype=np.int64),
            values=np.concatenate(values) if values else np.zeros(0),
        )
        keep(self.path, held.getvalue())
