"""What a loader gives: batches, by rank, from any place in an epoch on."""

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from clustermim.data.counted import permutation
from clustermim.data.pixels import adapt_channels
from clustermim.data.streaming.source import AnySource
from clustermim.data.views import ViewConfig, draw, eval_view, repeats, train_view
from clustermim.errors import ClusterMIMError
from clustermim.training.trouble import dead_worker

Augment = Callable[[Tensor, int, int], Tensor]
"""(training view (c, h, w) in [0, 1] on the CPU, epoch, index of the image) -> the view changed once more."""


@dataclass(frozen=True)
class Batch:
    """B views and where they come from, on one device."""

    images: Float[Tensor, "b c h w"]
    """Views in [0, 1]."""
    index: Int64[Tensor, " b"]
    """Index of each image in its source."""
    labels: Int64[Tensor, " b"] | None
    """Label of each image, or None."""
    keys: Int64[Tensor, " b"] | None = None
    """Under which to keep what follows from a view alone: the image's index where its view is the same in every epoch,
    else -1. On the CPU, because asking the device for it would make the host wait."""


@dataclass(frozen=True)
class Cutting:
    """How a reading process makes a view of an image."""

    view: ViewConfig
    """What it looks like."""
    crops: bool
    """A random crop and flip, or the eval view."""
    seed: int
    """What crops and flips are drawn from, and the order of an epoch."""
    augment: Augment | None
    """Applied to each crop."""

    def __call__(self, image: Shaped[Tensor, "C H W"], epoch: int, index: int) -> tuple[Float[Tensor, "c h w"], int]:
        """The view of one image in one epoch, and its key (`Batch.keys`)."""
        height, width = image.shape[-2:]
        image = adapt_channels(image, self.view.channels)
        key = index if self.repeats(height, width) else -1
        if not self.crops:
            return eval_view(image, self.view), key
        sizes = torch.tensor([[height, width]])
        view = train_view(image, draw(self.seed, epoch, torch.tensor([index]), sizes, self.view), self.view)
        return (view if self.augment is None else self.augment(view, epoch, index)), key

    def repeats(self, height: int, width: int) -> bool:
        """Whether an image of this stored size has the same view in every epoch."""
        return not self.crops or (self.augment is None and repeats(height, width, self.view))


@dataclass(frozen=True)
class Share:
    """Which batches a loader gives, and where; `make_loader` says what each field means."""

    batch_size: int
    train: bool
    device: torch.device
    rank: int
    world_size: int


class Loader(ABC):
    """Batches of one source; use `make_loader`."""

    def __init__(self, source: AnySource, cutting: Cutting, share: Share) -> None:
        self.source, self.cutting = source, cutting
        self.view, self.seed, self.batch_size, self.train = cutting.view, cutting.seed, share.batch_size, share.train
        self.device, self.rank, self.world_size = share.device, share.rank, share.world_size
        self._labels = None if source.labels is None else torch.as_tensor(source.labels, dtype=torch.int64)

    @property
    def num_images(self) -> int:
        """Images in the whole source, over all ranks."""
        return len(self.source)

    def _eval_range(self) -> range:
        """The contiguous block of images that this rank sees when not training."""
        total = len(self.source)
        return range(total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size)

    @property
    def first_image(self) -> int:
        """Index of the first image that this rank sees when not training."""
        return self._eval_range().start

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        if self.train:
            return len(self.source) // (self.batch_size * self.world_size)
        return -(-len(self._eval_range()) // self.batch_size)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Int64[Tensor, " b"]]:
        """The indices of each batch of an epoch, from batch `start` on."""
        if self.train:
            order = permutation(self.seed, epoch, len(self.source))
            whole = self.batch_size * self.world_size
            for number in range(start, len(self)):
                first = number * whole + self.rank * self.batch_size
                yield order[first : first + self.batch_size]
        else:
            mine = self._eval_range()
            for first in range(mine.start + start * self.batch_size, mine.stop, self.batch_size):
                yield torch.arange(first, min(first + self.batch_size, mine.stop))

    @abstractmethod
    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch.

        Parameters
        ----------
        epoch
            Decides the order, the crops and the flips when training.
        start
            Batches to leave out, without decoding them.
        """

    def repeats(self, height: int, width: int) -> bool:
        """Whether an image of this stored size has the same view in every epoch."""
        return self.cutting.repeats(height, width)

    def __iter__(self) -> Iterator[Batch]:
        """Epoch 0."""
        return self.epoch()


def leave_signals(worker: int) -> None:
    """In a process that reads images: a signal to the whole group is for the main process, which ends this one.

    SLURM and a terminal signal every process of a job. Readers that obeyed at once would look like a fault to the main
    process, which is about to write a checkpoint. A second SIGTERM is obeyed: it is the main process's.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _obey_the_next)


def _obey_the_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def reading(loader: Iterable[Any]) -> Iterator[Any]:
    """What the reading processes of a DataLoader send.

    Raises
    ------
    ClusterMIMError
        The one that was sent; or ResourceError when a process dies.
    """
    try:
        for item in loader:
            if isinstance(item, ClusterMIMError):
                raise item
            yield item
    except RuntimeError as problem:
        if isinstance(problem, ClusterMIMError) or "DataLoader worker" not in str(problem):
            raise
        raise dead_worker(problem) from None
