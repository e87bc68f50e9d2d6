"""From a source to batches: by worker processes, or with all images resident in the device's memory.

Both give the same images in the same order with the same crops, because order and crops are counted, not streamed.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clustermim.data.batches import Augment, Batch, Cutting, Loader, Share, leave_signals, reading
from clustermim.data.checking import in_threads
from clustermim.data.kept_views import KeptViews, kept_views
from clustermim.data.pixels import adapt_channels, convertible
from clustermim.data.sources import ImageSource
from clustermim.data.streaming.loader import StreamLoader
from clustermim.data.streaming.source import AnySource, StreamSource
from clustermim.data.views import ViewConfig, draw, eval_views, to_float, train_views
from clustermim.errors import ClusterMIMError, InputError

__all__ = [
    "Augment",
    "Batch",
    "Loader",
    "ResidentLoader",
    "WorkerLoader",
    "free_memory",
    "leave_signals",
    "make_loader",
]

_RESIDENT_SHARE = 0.25  # of free memory that images may take before workers are used instead


class ResidentLoader(Loader):
    """All images in the device's memory, as uint8 where they are; views are cut there, a batch at a time."""

    source: ImageSource

    def __init__(self, source: ImageSource, cutting: Cutting, share: Share, images: Shaped[Tensor, "n c h w"]) -> None:
        super().__init__(source, cutting, share)
        self.images = images
        self._labels = None if self._labels is None else self._labels.to(self.device)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """See `Loader.epoch`."""
        same = self.repeats(*self.images.shape[-2:])
        for index in self.batches(epoch, start):
            here = index.to(self.device)
            pixels = adapt_channels(self.images.index_select(0, here), self.view.channels)
            if self.cutting.crops:
                sizes = torch.tensor(pixels.shape[-2:]).expand(len(index), 2)
                views = train_views(pixels, draw(self.seed, epoch, index, sizes, self.view), self.view)
                if (augment := self.cutting.augment) is not None:
                    pairs = zip(views.cpu(), index.tolist(), strict=True)
                    views = torch.stack([augment(view, epoch, number) for view, number in pairs]).to(self.device)
            else:
                views = eval_views(pixels, self.view)
            keys = index if same else torch.full_like(index, -1)
            yield Batch(views, here, None if self._labels is None else self._labels[here], keys)


class WorkerLoader(Loader):
    """Images decoded and views cut by worker processes, for sources too large or too uneven for memory."""

    source: ImageSource

    def __init__(self, source: ImageSource, cutting: Cutting, share: Share, workers: int, keep: bool = False) -> None:
        super().__init__(source, cutting, share)
        self.workers = workers
        self._keeps = keep and not share.train and not cutting.crops

    def _kept(self) -> KeptViews | None:
        """Where views are kept; None where they change, or are too many for memory."""
        if not self._keeps:
            return None
        most = _RESIDENT_SHARE * free_memory(torch.device("cpu"))
        return kept_views(self.source, self.view, most)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """See `Loader.epoch`.

        Raises
        ------
        ResourceError
            When a worker process dies.
        """
        wanted, kept = list(self.batches(epoch, start)), self._kept()
        rows = torch.as_tensor(self.source.rows)
        if kept is not None and all(kept.has(rows[index]) for index in wanted):
            for index in wanted:
                yield self._batch(kept.get(rows[index]), index, index)
            return
        batches = [[(epoch, int(index)) for index in batch] for batch in wanted]
        loader: DataLoader[Any] = DataLoader(
            _Views(self.source, self.cutting),
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals,
        )
        for views, index, keys in reading(loader):
            if kept is not None:
                kept.put(rows[index], views)
            yield self._batch(views, index, keys)

    def _batch(self, views: Float[Tensor, "b c h w"], index: Int64[Tensor, " b"], keys: Int64[Tensor, " b"]) -> Batch:
        labels = None if self._labels is None else self._labels[index]
        return Batch(
            views.to(self.device, non_blocking=True),
            index.to(self.device, non_blocking=True),
            None if labels is None else labels.to(self.device),
            keys,
        )


class _Views(Dataset[Any]):
    """One view for each (epoch, index); runs in the workers."""

    def __init__(self, source: ImageSource, cutting: Cutting) -> None:
        self.source, self.cutting = source, cutting

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int, int] | ClusterMIMError:
        epoch, index = place
        try:
            view, key = self.cutting(self.source[index][0], epoch, index)
            return view, index, key
        except ClusterMIMError as problem:
            return problem  # raised through the worker it would arrive as a traceback


def _collate(
    items: list[tuple[Tensor, int, int] | ClusterMIMError],
) -> tuple[Tensor, Tensor, Tensor] | ClusterMIMError:
    views, index, keys = [], [], []
    for item in items:
        if isinstance(item, ClusterMIMError):
            return item
        views.append(item[0])
        index.append(item[1])
        keys.append(item[2])
    return torch.stack(views), torch.tensor(index), torch.tensor(keys)


def make_loader(
    source: AnySource,
    view: ViewConfig | None = None,
    *,
    batch_size: int,
    train: bool,
    crops: bool | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    resident: bool | None = None,
    rank: int = 0,
    world_size: int = 1,
    augment: Augment | None = None,
) -> Loader:
    """Batches of views of a source.

    Parameters
    ----------
    source
        Images.
    view
        What a view looks like; None takes the source's own.
    batch_size
        Images in a batch of one rank.
    train
        True: random order, random crops, only whole batches. False: every image once, in order, the eval view.
    crops
        Whether views are cut as for training; None: as `train` says. With `train=False` every image comes once, in
        order, in the training view of (seed, epoch, index).
    seed
        Seed of order, crops and flips.
    device
        Where the batches are wanted.
    workers
        Processes that read images; 0 reads in this one. None: one a core, at most 8, and only where images are not
        resident.
    resident
        Keep all images in the device's memory. None: if they are all of one size and take less than a quarter of
        what is free, unless `workers` is given; of images that differ in size the eval views, which never change, are
        kept in this machine's memory under the same conditions.
    rank, world_size
        Which part of each global batch, or of the source, this process sees.
    augment
        Applied to each training view, where it is cut: in the workers if there are any.

    Raises
    ------
    InputError
        When a global batch takes more images than there are, the channels cannot be converted, or `resident` is asked
        for and images differ in size.
    """
    view, device = view or source.view, torch.device(device)
    if batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {batch_size}.")
    if workers is not None and workers < 0:
        raise InputError(f"--workers must be at least 0, not {workers}.")
    if train and len(source) < batch_size * world_size:
        fits = len(source) // world_size
        remedy = f"use a --batch-size of at most {fits}" if fits else f"use at most {len(source)} devices"
        over = f" on each of {world_size} devices" if world_size > 1 else ""
        raise InputError(
            f"{source.name} ({source.split}) has {len(source)} images, too few for a batch of {batch_size}"
            f"{over}: {remedy}."
        )
    if not convertible(source.channels, view.channels):
        raise InputError(
            f"{source.name} has images of {source.channels} channel(s), which cannot become the "
            f"{view.channels} that are needed here: only 1 and 3 are converted into each other."
        )
    cutting = Cutting(view, train if crops is None else crops, seed, augment)
    share = Share(batch_size, train, device, rank, world_size)
    readers = min(8, os.cpu_count() or 1) if workers is None else workers
    if isinstance(source, StreamSource):
        if resident:
            raise InputError(f"{source.name} is a stream, which is not kept in memory: leave out --resident.")
        return StreamLoader(source, cutting, share, readers)
    if resident or (resident is None and workers is None and source.common_size is not None):
        images = _residents(source, device, must=bool(resident))
        if images is not None:
            return ResidentLoader(source, cutting, share, images)
    return WorkerLoader(source, cutting, share, readers, keep=resident is None and workers is None)


def _residents(source: ImageSource, device: torch.device, must: bool) -> Shaped[Tensor, "n c h w"] | None:
    """All images of a source on a device, kept with the source for its next loader; None when they do not fit."""
    kept: dict[str, Tensor] = source.__dict__.setdefault("_resident", {})
    if str(device) in kept:
        return kept[str(device)]
    first = source[0][0]
    if not must and first.numel() * first.element_size() * len(source) > _RESIDENT_SHARE * free_memory(device):
        return None
    whole = source.whole()
    images = torch.empty((len(source), *first.shape), dtype=first.dtype) if whole is None else whole
    for place, image in enumerate(
        in_threads(lambda index: source[index][0], range(len(source) if whole is None else 0))
    ):
        if image.shape != first.shape:
            if not must:
                return None
            raise InputError(
                f"{source.name} cannot be kept in memory as one block: image {place} is {image.shape[-2]}x"
                f"{image.shape[-1]} pixels, image 0 is {first.shape[-2]}x{first.shape[-1]}. Let workers read them."
            )
        if image.dtype != images.dtype:
            images = to_float(images)  # 8 and 16 bits mixed
        images[place] = to_float(image) if images.dtype == torch.float32 else image
    kept[str(device)] = images.to(device)
    return kept[str(device)]


def free_memory(device: torch.device) -> int:
    """Free bytes of a device, or of this machine within its container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = 4 << 30  # where the system does not say
    if Path("/proc/meminfo").exists():
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
