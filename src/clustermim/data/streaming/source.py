"""A stream as a source of images: what it holds, how it is viewed, and its images by number as long as numbers rise."""

import copy
import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from clustermim.data import checking, readers
from clustermim.data.collection import Collection
from clustermim.data.options import DataOptions
from clustermim.data.pixels import BadImage, OutOfRange, adapt_channels, convertible, out_of_range_error, to_unit
from clustermim.data.sources import ImageSource
from clustermim.data.streaming.order import StreamOptions
from clustermim.data.streaming.shards import Sample, Shards
from clustermim.data.views import ViewConfig
from clustermim.errors import InputError

_LOOKED_AT_SHARDS = 16  # from the front of each of which as many images are looked at


class Decoded(NamedTuple):
    """One image of a stream, ready to be viewed."""

    number: int
    """Which one it is."""
    sample: Sample
    """What was decoded."""
    pixels: Shaped[Tensor, "c h w"]
    """uint8, or float32 in [0, 1]."""
    unfit: tuple[str, str] | None
    """The image that it stands in for, and what is wrong with that one."""


class StreamSource:
    """The images of a stream, numbered through in the order of the shards; picklable for worker processes.

    Parameters
    ----------
    shards
        Where they lie.
    split
        What the shards are, as the user names it.
    options
        How images are read and viewed.
    order
        How an epoch is shuffled.

    Attributes
    ----------
    labels, classes, groups
        None: not known before the stream is read.
    labelled
        Whether its first image brings a label.
    wants_labels
        Whether batches shall bring labels; `require_labelled` asks for them.
    skipped
        What cannot be used of the shards, with the reason.

    Raises
    ------
    InputError
        When there are no images, too many of those looked at are bad, or an option is for other sources.
    """

    labels = None
    classes = None
    groups = None

    def __init__(self, shards: Shards, split: str, options: DataOptions, order: StreamOptions) -> None:
        if options.group is not None:
            raise InputError(
                f"--group {options.group!r} cannot be used with {shards.name}: no part of a stream is split off."
            )
        self.shards, self.split, self.options, self.order = shards, split, options, order
        self.counts = shards.counts
        if not len(self):
            raise InputError(f"{shards.name} holds no images: {checking.name_some(shards.problems) or 'it is empty'}.")
        first, sample = self._look()
        self.labelled, self.wants_labels = first.label is not None, False
        self.skipped = [*shards.problems, *sample.skipped]
        self.channels, self.common_size = sample.channels, sample.common_size
        self.view: ViewConfig = sample.view
        if options.limit is not None:
            self.counts = self._spread_counts(options.limit)

    @property
    def name(self) -> str:
        """What the source was opened as."""
        return self.shards.name

    @property
    def counts(self) -> np.ndarray:
        """(shards,) int64: images of each shard that belong to this source."""
        return self._counts

    @counts.setter
    def counts(self, counts: np.ndarray) -> None:
        self._counts, self._ends = counts, np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: Iterable[int]) -> Iterator[tuple[int, Sample]]:
        """Images by number, each with it. Within a shard numbers must rise; from shard to shard they may jump.

        Raises
        ------
        InputError, ResourceError
            As `Shards.read`.
        """
        for shard, members in groupby(index, key=self._shard_of):
            start = self._start(shard)
            for sample in self.shards.read(shard, (number - start for number in members)):
                yield start + sample.row, sample

    def decoded(self, index: int, sample: Sample) -> "Decoded":
        """An image that has been read; where it is bad, the next good one of its shard, round the end.

        Raises
        ------
        InputError
            When bad images shall be errors, or the shard has no other.
        """
        try:
            return Decoded(index, sample, self._pixels(sample), None)
        except BadImage as problem:
            bad = (sample.name, str(problem))
        if self.options.on_bad_image == "error":
            raise InputError(f"{bad[0]} of {self.name} cannot be read: {bad[1]}. Repair or remove it.")
        shard = self._shard_of(index)
        start, size = self._start(shard), int(self.counts[shard])
        for other in chain(
            self.shards.read(shard, range(sample.row + 1, size)), self.shards.read(shard, range(sample.row))
        ):
            try:
                return Decoded(start + other.row, other, self._pixels(other), bad)
            except BadImage:
                continue
        raise InputError(
            f"{self.shards.names[shard]} of {self.name} has no image that can be read, {bad[0]} ({bad[1]}) for one."
        )

    def spread(self, most: int) -> "StreamSource":
        """At most so many images, from the fronts of the shards; viewed as these are."""
        if len(self) <= most:
            return self
        part = copy.copy(self)
        part.counts = self._spread_counts(most)
        return part

    def fingerprint(self) -> str:
        """Identifies the images: names, sizes and numbers of images of the shards, split, channels and value range."""
        digest = hashlib.sha256()
        self.shards.identify(digest)
        digest.update(self.counts.astype(np.int64).tobytes())
        digest.update(f"{self.split} {self.channels} {self.options.value_range}".encode())
        return digest.hexdigest()

    def skipped_message(self) -> str | None:
        """One sentence on what was left out, or None."""
        if not self.skipped:
            return None
        return f"Not used of {self.name}: {checking.name_some(self.skipped)}."

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _start(self, shard: int) -> int:
        return int(self._ends[shard] - self._counts[shard])

    def _pixels(self, sample: Sample) -> Shaped[Tensor, "c h w"]:
        try:
            image = to_unit(readers.decode(sample.data), self.options.value_range)
        except OutOfRange as problem:
            raise out_of_range_error(self.name, problem.low, problem.high, problem.kind) from None
        if not convertible(image.shape[0], self.channels):
            raise BadImage(f"{image.shape[0]} channels where the others have {self.channels}")
        return adapt_channels(image, self.channels)

    def _spread_counts(self, most: int) -> np.ndarray:
        """As many of each shard as make `most` together, small shards being taken whole."""
        low, high = 0, int(self.counts.max())
        while low < high:  # the largest number that may be taken of each
            middle = (low + high + 1) // 2
            low, high = (middle, high) if np.minimum(self.counts, middle).sum() <= most else (low, middle - 1)
        taken = np.minimum(self.counts, low)
        rest = max(0, min(most, len(self)) - int(taken.sum()))
        larger = np.flatnonzero(self.counts > low)
        if rest:
            taken[larger[np.linspace(0, len(larger) - 1, rest).round().astype(np.int64)]] += 1
        return np.asarray(taken)

    def _look(self) -> tuple[Sample, ImageSource]:
        """The first image, and a sample of images from the fronts of some shards, checked and measured."""
        full = np.flatnonzero(self.counts)
        looked = full[np.unique(np.linspace(0, len(full) - 1, _LOOKED_AT_SHARDS).round().astype(np.int64))]
        each = checking.SAMPLE // len(looked)
        samples = [
            sample
            for shard in looked.tolist()
            for sample in self.shards.read(shard, range(min(each, int(self.counts[shard]))))
        ]
        collection = Collection(self.name, _Samples(samples))
        findings = checking.examine(collection, self.options)
        channels = checking.choose_channels(collection, self.options, findings)
        checking.refuse_bad(collection, self.options, findings, [*self.shards.problems])
        rows = np.array([row for row in range(len(samples)) if row not in findings.bad], dtype=np.int64)
        sample = ImageSource(collection, self.options, findings, channels, "train", rows, rows, None)
        return samples[0], sample


class _Samples:
    """Images that have been read, as a store."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, row: int) -> np.ndarray:
        return readers.decode(self.samples[row].data)

    def glance(self, row: int) -> None:
        readers.glance(self.samples[row].data)

    def label_of(self, row: int) -> str:
        return self.samples[row].name

    def identify(self, digest: "hashlib._Hash") -> None:
        """Not asked for: the shards identify the stream."""


AnySource: TypeAlias = ImageSource | StreamSource
"""What can be read in order."""
