"""Frozen features, computed once for each encoder and source and then shared by all protocols."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clustermim.data.loaders import Loader
from clustermim.encoders.contract import Encoder
from clustermim.errors import InputError

Layers = Literal["last", "all"]

Progress = Callable[[str, int, int], None]
"""(what is being done, images done, images in all)."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class FeatureBank:
    """Features of every image of a source, in its order, on the CPU."""

    vectors: dict[tuple[int, str], Float[Tensor, "n d"]]
    """(layer, pool) -> one float32 vector an image; the width may differ from layer to layer."""

    labels: Int64[Tensor, " n"]
    """Class of each image."""

    groups: np.ndarray | None
    """Group of each image, if the source has groups."""


def extract(encoder: Encoder, loader: Loader, layers: Layers = "last", *, progress: Progress = silent) -> FeatureBank:
    """Run every image of a loader through an encoder once.

    Parameters
    ----------
    encoder
        On the loader's device.
    loader
        Over a labelled source, with `train=False` and of one rank.
    layers
        `last`, or `all` of them.
    progress
        Told after each batch.

    Returns
    -------
    FeatureBank
        Under every pool that the encoder has: its global vector and the mean of its patches.

    Raises
    ------
    InputError
        The encoder gives NaN or infinite features.
    """
    source = loader.source
    assert source.labels is not None, "the caller has asked for labels"
    which = range(encoder.depth) if layers == "all" else range(encoder.depth - 1, encoder.depth)
    total, filled = len(source), 0
    vectors: dict[tuple[int, str], Tensor] = {}
    with torch.inference_mode():
        for batch in loader.epoch():
            outputs = encoder.layers(batch.images, which)
            size = len(batch.index)
            for layer, output in zip(which, outputs, strict=True):
                for pool, block in output.pooled(encoder.global_name).items():
                    if not block.isfinite().all():
                        raise InputError(
                            f"{encoder.name} gives NaN or infinite features (layer {layer}, {pool}) for images of "
                            f"{source.name}. Its weights may be damaged, or made by a training that diverged."
                        )
                    if (layer, pool) not in vectors:
                        vectors[layer, pool] = torch.empty(total, block.shape[1], dtype=torch.float32)
                    vectors[layer, pool][filled : filled + size] = block.float().cpu()
            filled += size
            progress(f"features of {encoder.name} on {source.name} ({source.split})", filled, total)
    return FeatureBank(vectors, torch.as_tensor(source.labels, dtype=torch.int64), source.groups)
