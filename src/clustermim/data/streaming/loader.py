"""Batches of a stream: each reading process goes through lanes of its own from the front."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clustermim.data.batches import Batch, Cutting, Loader, Share, leave_signals, reading
from clustermim.data.checking import MOST_BAD
from clustermim.data.streaming.order import EpochOrder
from clustermim.data.streaming.shards import Sample
from clustermim.data.streaming.source import StreamSource
from clustermim.errors import ClusterMIMError, InputError

_AHEAD = 4  # parts of batches that a reading process has ready
_NAMED = 5  # bad images that are named
_FEW = 1000  # images of which so many as a tenth may be bad, however few have been read

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """What one reading process brings to a batch."""

    places: Tensor
    """(m,) int64: where in the batch."""
    images: Tensor
    """(m, C, h, w)."""
    numbers: Tensor
    """(m,) int64: which images they are."""
    labels: Tensor
    """(m,) int64, or empty."""
    keys: Tensor
    """(m,) int64, as in a batch."""
    bad: list[tuple[str, str]]
    """Images that could not be used, each of which another stands in for."""


class StreamLoader(Loader):
    """Batches of a stream: in training in the order of `EpochOrder`, else every image once, in order.

    Reading processes share out the lanes, and otherwise the batches. A resumed epoch starts with the windows in which
    it stopped: for each lane that costs passing over a part of a shard and reading a window again.
    """

    source: StreamSource

    def __init__(self, source: StreamSource, cutting: Cutting, share: Share, workers: int) -> None:
        super().__init__(source, cutting, share)
        most = source.order.lanes_of(source.counts) if self.train else 8 if source.shards.local else 1
        self.workers = min(workers, most)
        self._seen = 0
        self._bad: dict[str, str] = {}

    def order(self, epoch: int) -> EpochOrder:
        """Which image comes when in training."""
        return EpochOrder(self.source.counts, self.seed, epoch, self.source.order)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Int64[Tensor, " b"]]:
        """See `Loader.batches`."""
        if not self.train:
            yield from super().batches(epoch, start)
            return
        order = self.order(epoch)
        for number in range(start, len(self)):
            parts = [order.images(*segment) for segment in self._share(order, number)]
            yield torch.from_numpy(np.concatenate(parts))

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """See `Loader.epoch`.

        Raises
        ------
        InputError
            When more than a tenth of the images are bad, or any where that shall be an error.
        ResourceError
            When a shard cannot be read any more, or a reading process dies.
        """
        loader: DataLoader[Any] = DataLoader(
            _Reader(self, epoch, start),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals,
            prefetch_factor=_AHEAD if self.workers else None,
        )
        items = reading(loader)
        together = max(1, self.workers) if self.train else 1
        for _ in range(start, len(self)):
            yield self._joined(list(islice(items, together)))

    def _share(self, order: EpochOrder, number: int) -> list[tuple[int, int, int]]:
        first = number * self.batch_size * self.world_size
        return order.share(first, self.batch_size, self.rank, self.world_size)

    def _joined(self, parts: list[Part]) -> Batch:
        self._note(parts)
        order = torch.cat([part.places for part in parts]).argsort()
        here = order.to(self.device)
        columns = zip(*((part.images, part.numbers, part.labels) for part in parts), strict=True)
        images, index, labels = (
            torch.cat([tensor.to(self.device, non_blocking=True) for tensor in column]) for column in columns
        )
        keys = torch.cat([part.keys for part in parts])[order]
        return Batch(images[here], index[here], labels[here] if self.source.wants_labels else None, keys)

    def _note(self, parts: list[Part]) -> None:
        """Tell of bad images, and stop where they are too many."""
        self._seen += sum(len(part.numbers) for part in parts)
        for name, reason in (bad for part in parts for bad in part.bad):
            if name in self._bad:
                continue
            self._bad[name] = reason
            if len(self._bad) <= _NAMED:
                more = " No more of them will be named." if len(self._bad) == _NAMED else ""
                logger.warning(
                    "%s of %s is no usable image (%s): the next one of its shard takes its place.%s",
                    name,
                    self.source.name,
                    reason,
                    more,
                )
        if len(self._bad) > MOST_BAD * max(self._seen, _FEW):
            name, reason = next(iter(self._bad.items()))
            raise InputError(
                f"{len(self._bad)} of the {self._seen} images read of {self.source.name} are not usable, {name} "
                f"({reason}) for one: up to 10 % may be. Repair the shards, or leave them out."
            )


class _Reader(IterableDataset[Any]):
    """The parts of all batches that this process is to bring; runs in the workers."""

    def __init__(self, loader: StreamLoader, epoch: int, start: int) -> None:
        self.loader, self.source, self.cutting = loader, loader.source, loader.cutting
        self.number, self.start = epoch, start

    def __iter__(self) -> Iterator[Part | ClusterMIMError]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        try:
            yield from (self._lanes if self.loader.train else self._turns)(worker, workers)
        except ClusterMIMError as problem:
            yield problem  # raised through the worker it would arrive as a traceback

    def _lanes(self, worker: int, workers: int) -> Iterator[Part]:
        """A part of every batch: the images of the lanes of this process."""
        order = self.loader.order(self.number)
        lanes: dict[int, _Lane] = {}
        for number in range(self.start, len(self.loader)):
            samples, place = [], 0
            for lane, first, last in self.loader._share(order, number):
                if lane % workers == worker:
                    if lane not in lanes:
                        lanes[lane] = _Lane(self.source, order, lane, first)
                    samples += [(place + k - first, *lanes[lane].take(k)) for k in range(first, last)]
                place += last - first
            yield self._part(samples)

    def _turns(self, worker: int, workers: int) -> Iterator[Part]:
        """Whole batches, every so many-th."""
        mine = list(islice(self.loader.batches(self.number, self.start), worker, None, workers))
        samples = self.source.read(index for batch in mine for index in batch.tolist())
        for batch in mine:
            yield self._part([(place, *next(samples)) for place in range(len(batch))])

    def _part(self, samples: list[tuple[int, int, Sample]]) -> Part:
        places, views, numbers, labels, keys = [], [], [], [], []
        bad: list[tuple[str, str]] = []
        for place, index, sample in samples:
            found = self.source.decoded(index, sample)
            bad += [] if found.unfit is None else [found.unfit]
            places.append(place)
            view, key = self.cutting(found.pixels, self.number, found.number)
            views.append(view)
            keys.append(key)
            numbers.append(found.number)
            if self.source.wants_labels:
                labels.append(self._label(found.sample))
        height, width = self.cutting.view.image_size
        images = torch.stack(views) if views else torch.empty(0, self.cutting.view.channels, height, width)
        columns = (torch.tensor(values, dtype=torch.int64) for values in (places, numbers, labels, keys))
        whole = dict(zip(("places", "numbers", "labels", "keys"), columns, strict=True))
        return Part(images=images, bad=bad, **whole)

    def _label(self, sample: Sample) -> int:
        if sample.label is None:
            raise InputError(
                f"{sample.name} of {self.source.name} has no label that is a whole number, and one is needed."
            )
        return sample.label


def _as_it_is(item: Any) -> Any:
    return item


class _Lane:
    """One lane from a place on: holds the encoded images of the window that is being taken, and reads the next.

    Reading keeps pace with taking, so that no window has to be waited for but the first.
    """

    def __init__(self, source: StreamSource, order: EpochOrder, lane: int, place: int) -> None:
        self.order, self.lane, self.block = order, lane, place // order.window
        self.samples = source.read(order.reading(lane, self.block))
        self.taken = order.block(lane, self.block)
        self.held = dict(islice(self.samples, len(self.taken)))
        self.coming: dict[int, Sample] = {}

    def take(self, place: int) -> tuple[int, Sample]:
        """Number and sample of the image at a place; places must rise."""
        while place // self.order.window > self.block:
            self.block += 1
            self.taken = self.order.block(self.lane, self.block)
            self.held = self.coming | dict(islice(self.samples, len(self.taken) - len(self.coming)))
            self.coming = {}
        index = int(self.taken[place % self.order.window])
        self.coming.update(islice(self.samples, 1))
        return index, self.held.pop(index)
