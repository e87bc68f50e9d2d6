"""What a stream is made of: shards that are read from the front, and how many images each of them has."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from clustermim.errors import InputError, ResourceError


@dataclass(frozen=True)
class Sample:
    """One image, not yet decoded."""

    row: int
    """Its place among the images of its shard."""
    name: str
    """What to call it in a message: shard and member, or shard and row."""
    data: bytes
    """The encoded image."""
    label: int | None
    """Its label, or None."""


@runtime_checkable
class Shards(Protocol):
    """Where the images of a stream lie. Picklable for worker processes."""

    name: str
    """What the stream was opened as."""
    names: list[str]
    """What to call each shard in a message."""
    counts: np.ndarray
    """(shards,) int64: images of each, known beforehand, so that the order of an epoch can be planned."""
    local: bool
    """Whether passing over images costs little: the shards are files of this machine."""
    problems: list[tuple[str, str]]
    """Shards that are empty, cut short or no shards at all, with the reason."""

    def read(self, shard: int, rows: Iterable[int]) -> Iterator[Sample]:
        """The images of one shard at increasing `rows`; those between them are passed over without being loaded.

        Raises
        ------
        InputError
            When the shard has fewer images than was said.
        ResourceError
            When it cannot be read.
        """
        ...

    def identify(self, digest: "hashlib._Hash") -> None:
        """Feed what identifies the shards (names and sizes) to a hash."""
        ...


def ended_early(shard: str, found: int, row: int) -> InputError:
    """The error for a shard that has fewer images than was counted or said."""
    return InputError(
        f"{shard} has {found} images, but image {row} of it is needed: it has changed since its images were counted, "
        f"or the list of sizes beside it is wrong."
    )


def unreadable(shard: str, reason: str) -> ResourceError:
    """The error for a shard that was there when work began, and cannot be read now."""
    return ResourceError(f"{shard} cannot be read any more: {reason}.", again={"resume": True})
