"""The order in which an epoch takes the images of a stream: a function of (seed, epoch) and the sizes of the shards.

The shards, in a random order, are laid behind each other and cut into lanes of equal length. A lane is read from the
front; within windows of fixed places its images change places at random. The epoch takes one image of each lane in
turn. Nothing of this depends on who reads: the number of processes and of workers decides only who reads which lane.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from clustermim.data.counted import Stream, counter_hash, permutation
from clustermim.errors import InputError

MOST_LANES = 64
"""Lanes at most where none are asked for: as many as the readers of one machine can share."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How an epoch over a stream is shuffled, which is read from the front."""

    lanes: int | None = None
    """Places at which a stream is read at the same time: images are taken from each in turn, and the reading processes
    of all devices share the lanes out among them. Default: one a shard, at most 64."""

    shuffle_window: int = 4096
    """Images that change places with each other at random, over all lanes; so many encoded images are held in memory,
    over all processes. The order of the shards is random besides."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("lanes", "shuffle_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")

    def lanes_of(self, counts: np.ndarray) -> int:
        """The number of lanes for shards of so many images."""
        asked = min(MOST_LANES, int((counts > 0).sum())) if self.lanes is None else self.lanes
        return max(1, min(asked, int(counts.sum())))


class EpochOrder:
    """Which image comes when in one epoch.

    Parameters
    ----------
    counts
        (shards,) int64: images of each shard; the images are numbered through in the order of the shards.
    seed, epoch
        What the order is drawn from.
    options
        Lanes and window.

    Attributes
    ----------
    lanes
        L. Place q of the epoch is place q // L of lane q % L.
    window
        Places of a lane that are shuffled together: block b of a lane holds its places from b · window on.
    """

    def __init__(self, counts: np.ndarray, seed: int, epoch: int, options: StreamOptions) -> None:
        self.seed, self.epoch = seed, epoch
        self.total = int(counts.sum())
        self.lanes = options.lanes_of(counts)
        self.window = max(1, options.shuffle_window // self.lanes)
        shards = permutation(seed, epoch, len(counts)).numpy()
        self._ends = np.cumsum(counts[shards])
        # What to add to a place in the laid-out shards to get the number of the image there.
        self._shift = (np.cumsum(counts) - counts)[shards] - (self._ends - counts[shards])

    def length(self, lane: int) -> int:
        """Images of a lane: all lanes have the same, the first few one more."""
        return self.total // self.lanes + (lane < self.total % self.lanes)

    def reading(self, lane: int, block: int) -> Iterator[int]:
        """The images of a lane from a block on, as they are read: by shard, and in a shard from the front."""
        for first in range(block * self.window, self.length(lane), self.window):
            yield from self._laid(lane, first).tolist()

    def block(self, lane: int, block: int) -> np.ndarray:
        """The images of one block of a lane, as they are taken: (at most `window`,) int64."""
        images = self._laid(lane, block * self.window)
        keys = counter_hash(self.seed, Stream.WINDOW, self.epoch, torch.from_numpy(images))
        return np.asarray(images[keys.argsort().numpy()])

    def _laid(self, lane: int, first: int) -> np.ndarray:
        """The images at up to `window` places of a lane from `first` on, before they change places."""
        start = lane * (self.total // self.lanes) + min(lane, self.total % self.lanes)
        places = start + np.arange(first, max(first, min(first + self.window, self.length(lane))), dtype=np.int64)
        return np.asarray(places + self._shift[np.searchsorted(self._ends, places, side="right")])

    def share(self, first: int, size: int, rank: int, ranks: int) -> list[tuple[int, int, int]]:
        """The part of a global batch that one process reads, as (lane, first place, one past the last place).

        The batch is ordered by lane and cut into equal parts, so where batch and lanes can be divided by the number of
        processes, each of them reads lanes of its own.

        Parameters
        ----------
        first
            Place in the epoch at which the global batch begins.
        size
            Images of one process.
        rank, ranks
            Which process, and of how many.
        """
        found, before = [], -rank * size
        for lane in range(self.lanes):
            low, high = (-(-(end - lane) // self.lanes) for end in (first, first + size * ranks))
            start, stop = low + max(0, -before), min(high, low + size - before)
            before += high - low
            if start < stop:
                found.append((lane, start, stop))
        return found

    def images(self, lane: int, start: int, stop: int) -> np.ndarray:
        """The images at some places of a lane, as they are taken."""
        blocks = range(start // self.window, -(-stop // self.window))
        joined = np.concatenate([self.block(lane, block) for block in blocks])
        return joined[start - blocks.start * self.window : stop - blocks.start * self.window]
