"""A k-NN probe of an encoder that is being trained: does its space tell classes apart, epoch by epoch?

Bank and queries are training images both. Test labels stay sealed: who watches a training by test images chooses by
them.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clustermim.data.loaders import make_loader
from clustermim.data.options import DataOptions
from clustermim.data.sources import require_labels
from clustermim.data.splits import take
from clustermim.data.streaming.opening import open_images, require_labelled
from clustermim.data.streaming.source import AnySource, StreamSource
from clustermim.data.views import ViewConfig
from clustermim.encoders.timm_encoder import TimmEncoder
from clustermim.errors import InputError
from clustermim.evaluation.evaluating import exact_products
from clustermim.evaluation.knn import fit_knn
from clustermim.evaluation.protocols import validation_rows
from clustermim.mim.watching import Moment, Sight

PROBE = "k-NN probe"

PROBE_IMAGES = 5000
"""Images of a probe unless told otherwise: enough for a curve, and seconds to encode."""

_SEED = 0
"""Of which images are taken, and which of them ask: the same in every epoch, and in every run on the same data."""

_BATCH = 256


def open_probe(source: AnySource, data: Any, options: DataOptions, most: int = PROBE_IMAGES) -> AnySource:
    """The labelled training images that a probe looks at.

    Parameters
    ----------
    source
        What is trained on.
    data
        Where to take other images from; None takes those of `source`.
    options
        How the images of `source` are read and split: `data` is split alike, so that its test images are those that
        `clustermim probe` holds out.
    most
        How many at most: stratified by class, or from the fronts of the shards of a stream.

    Raises
    ------
    InputError
        There are no labels, a single class, no two images of any class, or the images named are no training images.
    """
    view = source.view
    if data is not None:
        size = {"image_size": view.image_size, "channels": view.channels, "mean": view.mean, "std": view.std}
        source = open_images(data, replace(options, limit=None, **size))  # type: ignore[arg-type]
    if source.split in ("test", "all"):
        raise InputError(
            f"--probe-every judges by training images, so that test labels stay sealed, but {source.name} gives its "
            f"split {source.split!r}. Leave out #{source.split}, or give labelled images with --probe-data SRC."
        )
    try:
        if isinstance(source, StreamSource):
            part = copy.copy(source.spread(most))  # labels are asked for in this one only
            require_labelled(part, "--probe-every")
            return part
        labels = require_labels(source, "--probe-every")
        places = take(np.arange(len(source)), labels, most, _SEED)
        validation_rows(
            torch.as_tensor(labels[places]), None if source.groups is None else source.groups[places], _SEED
        )
    except InputError as error:
        raise InputError(f"{error} Or give labelled images of another source with --probe-data SRC.") from None
    return source.subset(places)


class KNNProbe:
    """k-NN (see `evaluation.knn`) on the images of `open_probe`: four fifths are the bank, one fifth asks.

    It has an encoder of its own, which is given the weights to be judged, so that the one in training is not touched.

    Parameters
    ----------
    encoder
        A timm ViT; kept on the CPU between probes.
    images
        From `open_probe`.
    view
        What the encoder is trained on; images are seen in the eval view of this size, channels, mean and std.
    device
        Where to compute.
    workers, resident
        Of the training's loader. Images are kept in memory where they fit and neither says otherwise: in the machine's,
        because the device's is for the training.
    """

    def __init__(
        self,
        encoder: nn.Module,
        images: AnySource,
        view: ViewConfig,
        device: torch.device,
        workers: int | None = None,
        resident: bool | None = None,
    ) -> None:
        self.images, self.device = images, device
        self.encoder = TimmEncoder(
            encoder,
            "The encoder",
            image_size=view.image_size,
            channels=view.channels,
            mean=view.mean,
            std=view.std,
        )
        self._loader = make_loader(
            images,
            view,
            batch_size=_BATCH,
            train=False,
            workers=workers,
            resident=False if resident is False else None,
        )

    def judge(self) -> dict[str, float]:
        """Share of the asking images that are named right, and the k by which, for each pool.

        Returns
        -------
        dict
            `knn_cls`, `knn_cls_k` for the class token, `knn_mean`, `knn_mean_k` for the mean of the patches. k is the
            best on the asking images themselves, so the figure is that of a validation split.

        Raises
        ------
        InputError
            The features are not finite, or a stream brings images without labels, or of one class.
        """
        encoder = self.encoder.to(self.device)
        try:
            with exact_products(), torch.inference_mode():
                return self._judge(encoder)
        finally:
            encoder.to("cpu")

    def _judge(self, encoder: TimmEncoder) -> dict[str, float]:
        blocks: dict[str, list[Tensor]] = {}
        told: list[Tensor] = []
        for batch in self._loader.epoch():
            for pool, block in encoder(batch.images.to(self.device)).pooled().items():
                blocks.setdefault(pool, []).append(block.float())
            assert batch.labels is not None  # open_probe has asked for them
            told.append(batch.labels)
        labels = torch.cat(told)
        if bool((labels == labels[0]).all()):
            raise InputError("the images of the probe are of a single class")
        validation = validation_rows(labels, self.images.groups, _SEED)
        figures: dict[str, float] = {}
        for pool, parts in blocks.items():
            features = torch.cat(parts)
            if not features.isfinite().all():
                raise InputError("the features of the encoder are NaN or infinite")
            judge = fit_knn(features, labels.to(self.device), int(labels.max()) + 1, validation.to(self.device))
            figures |= {f"knn_{pool}": judge.chosen["val_top1"], f"knn_{pool}_k": judge.chosen["k"]}
        return figures


class ProbeLook:
    """A k-NN probe of the encoder, or of its running mean."""

    name = PROBE

    def __init__(self, probe: KNNProbe) -> None:
        self.probe = probe

    def __call__(self, moment: Moment) -> Sight:
        """See `Look`."""
        self.probe.encoder.model.load_state_dict(moment.mean or encoder_state(moment.model))
        figures = self.probe.judge()
        pools = {"cls": "class token", "mean": "mean of the patches"}
        told = [
            f"{100 * figures[f'knn_{pool}']:.1f} % by the {words} (k = {figures[f'knn_{pool}_k']:.0f})"
            for pool, words in pools.items()
            if f"knn_{pool}" in figures
        ]
        shares = "/".join(f"{100 * figures[f'knn_{pool}']:.1f}" for pool in pools if f"knn_{pool}" in figures)
        return Sight(told=f"k-NN names {', '.join(told)}.", figures=figures, news=f" · k-NN {shares} %")


def encoder_state(model: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's part of the state of a masked model."""
    return {key.removeprefix("encoder."): value for key, value in model.items() if key.startswith("encoder.")}
