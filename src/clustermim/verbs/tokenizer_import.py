"""`clustermim tokenizer import`: centroids that were made elsewhere, as a tokenizer."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from clustermim.data.options import NUMBERS, SIZES, DataOptions
from clustermim.data.views import ViewConfig
from clustermim.errors import InputError
from clustermim.features.patches import PatchFeatures
from clustermim.features.spelling import parse_spec
from clustermim.runs import RunDirectory, atomic_write
from clustermim.tokenizers.codebook import Metric
from clustermim.tokenizers.importing import import_centroids, read_centroids
from clustermim.tokenizers.tokenizer import Tokenizer


def import_tokenizer(
    centroids: Annotated[Any, Parameter()],
    features: Annotated[Any, Parameter()] = "pixel",
    *,
    patch_size: int,
    image_size: Annotated[int | tuple[int, ...], SIZES],
    channels: int = 3,
    mean: Annotated[tuple[float, ...] | None, NUMBERS] = None,
    std: Annotated[tuple[float, ...] | None, NUMBERS] = None,
    metric: Metric = "l2",
    key: str | None = None,
    out: Annotated[Path | None, Parameter(required=True)] = None,
    json: Path | None = None,
) -> Tokenizer:
    """Make a tokenizer of centroids that were clustered elsewhere.

    A patch gets the id of its nearest centroid, so the features must be the very ones that were clustered. Pixels are
    ordered as rows, then columns, then channels in a patch.

    Parameters
    ----------
    centroids
        File of a (K, D) float table: .npy, .safetensors, .pt or .pth; files that would have to run code are refused. In
        Python also a tensor or an array.
    features
        What the centroids describe: pixel[?standardise=true&context=12], backbone:NAME[@FILE][?layer=9&size=224] with
        a timm NAME, or several joined by +.
    patch_size
        Patch side in pixels.
    image_size
        Size of the images to tokenize, in pixels: one number, or height and width.
    channels
        Channels of the images.
    mean
        Mean of each channel, in [0, 1], that was subtracted from pixels; one number does for all. Needed with pixel
        features: --mean 0 --std 1 if they were left as they are.
    std
        Standard deviation of each channel, by which pixels were divided.
    metric
        What nearest means: l2, cosine, or dot for the largest inner product.
    key
        Name of the tensor, where the file holds several; inner names are joined by dots.
    out
        Folder for the tokenizer; must be new or empty.
    json
        Also write the table to this file.

    Returns
    -------
    Tokenizer
        On the CPU.

    Raises
    ------
    InputError
        The file cannot be read, or its table does not fit the features; or `out` holds something else.
    """
    view = _view(features, image_size, channels, mean, std)
    from_file = isinstance(centroids, str | Path)
    table = read_centroids(centroids, key) if from_file else torch.as_tensor(centroids)
    where = f"The centroids in {centroids}" if from_file else "The centroids"
    tokenizer = import_centroids(table, features, patch_size=patch_size, view=view, metric=metric, where=where)
    if out is not None:
        given: dict[str, Any] = {
            "centroids": centroids if from_file else "in memory",
            "features": features.spec if isinstance(features, PatchFeatures) else features,
            "patch_size": patch_size,
            "image_size": list(view.image_size),
            "channels": channels,
            "mean": list(view.mean),
            "std": list(view.std),
            "metric": metric,
            "key": key,
        }
        config = {name: value for name, value in given.items() if value is not None}
        with RunDirectory(out, "tokenizer import", config) as run:
            tokenizer.save_pretrained(run.path)
            run.finish({"tokenizer": tokenizer.fingerprint(), "result": tokenizer.rows()[0]})
    if json is not None:
        atomic_write(json, jsonlib.dumps(tokenizer.rows(), indent=1))
    return tokenizer


def _view(
    features: str | PatchFeatures,
    image_size: int | tuple[int, ...],
    channels: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> ViewConfig:
    """The images that the tokenizer is for."""
    options = DataOptions(image_size=image_size, channels=channels, mean=mean, std=std)
    if isinstance(features, str) and any(part.name == "pixel" for part in parse_spec(features)[0]):
        for name, value in (("mean", mean), ("std", std)):
            if value is None:
                raise InputError(
                    f"--{name} is needed: pixels are normalised by mean and std before they are compared, so tokens "
                    "depend on them. Give those with which the centroids were made: --mean 0 --std 1 for pixels in "
                    "[0, 1] as they are."
                )
    assert options.size is not None
    return ViewConfig(
        image_size=options.size,
        channels=channels,
        mean=_for_each(options.mean or (0.0,), channels),
        std=_for_each(options.std or (1.0,), channels),
    )


def _for_each(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values
