"""Probes that are trained by gradient on fresh views: the encoder is frozen, its outputs are made anew each epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from lightning_fabric import Fabric
from torch import Tensor

from clustermim.data.loaders import Loader, make_loader
from clustermim.data.sources import ImageSource
from clustermim.data.views import ViewConfig
from clustermim.encoders.contract import Encoder, EncoderOutput
from clustermim.evaluation.cache import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a probe is trained on: a frozen encoder, and training images that are seen in views."""

    encoder: Encoder
    """On `device`."""
    train: ImageSource
    """Labelled."""
    view: ViewConfig
    which: Sequence[int]
    """Layers that are judged."""
    num_classes: int
    validation: Bool[Tensor, " n"]
    """Images that choices are made on."""
    epochs: int | None = None
    """None: what the protocol prescribes."""
    batch_size: int = 256
    """Images that the encoder takes at a time, on each process."""
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    workers: int | None = None
    seed: int = 0
    fabric: Fabric | None = None
    progress: Progress = silent

    def loader(self, *, train: bool, batch_size: int | None = None) -> Loader:
        """Batches of training images, in random views or in the one eval view; this process's part of each."""
        return make_loader(
            self.train,
            self.view,
            batch_size=batch_size or self.batch_size,
            train=train,
            seed=self.seed,
            device=self.device,
            workers=self.workers,
            rank=0 if self.fabric is None else self.fabric.global_rank,
            world_size=1 if self.fabric is None else self.fabric.world_size,
        )

    @property
    def chunk(self) -> int:
        """Images of a training batch on each process: as many as the encoder takes, or all there are."""
        world = 1 if self.fabric is None else self.fabric.world_size
        return max(1, min(self.batch_size, len(self.train) // world))

    def outputs(
        self, loader: Loader, epoch: int = 0
    ) -> Iterator[tuple[dict[int, EncoderOutput], Int64[Tensor, " b"], Int64[Tensor, " b"]]]:
        """(layer -> outputs, labels, index in the source) of each batch of an epoch; the encoder gets no gradient."""
        for batch in loader.epoch(epoch):
            with torch.no_grad():
                found = self.encoder.layers(batch.images, list(self.which))
            assert batch.labels is not None, "the caller has asked for labels"
            yield dict(zip(self.which, found, strict=True)), batch.labels, batch.index
