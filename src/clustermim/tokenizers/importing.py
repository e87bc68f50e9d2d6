"""Centroids that were made elsewhere: read from a file without running anything in it, and made a tokenizer here."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from clustermim.data.views import ViewConfig
from clustermim.encoders.weights import read_without_running, shape
from clustermim.errors import InputError, nearest
from clustermim.features.patches import PatchFeatures, make_features
from clustermim.runs import environment_facts
from clustermim.tokenizers.clustered import KMeansTokenizer
from clustermim.tokenizers.codebook import Codebook, Metric

SUFFIXES = (".npy", ".pt", ".pth", ".safetensors")


def read_centroids(path: str | Path, key: str | None = None) -> Shaped[Tensor, "..."]:
    """The one tensor of a file of centroids, as it stands there; `checked_centroids` judges it.

    Parameters
    ----------
    path
        `.npy`, `.pt`, `.pth` or `.safetensors`. Pickled code is refused, never run.
    key
        Which tensor, where a file holds several; inner names are joined by dots (`quantize.embedding`).

    Raises
    ------
    InputError
        No such file, another kind of file, a damaged one, one that would have to run code, or one in which `key` is
        needed or not to be found.
    """
    path = Path(path)
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*") if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        raise InputError(f"There are no centroids at {path}: no such file.{nearest(str(path), beside)}")
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: centroids are read from {', '.join(SUFFIXES)}, not from {path.suffix or 'a file without suffix'}."
        )
    if path.suffix == ".npy":
        if key is not None:
            raise InputError(f"--key {key}: {path} is an .npy file, which holds a single array. Leave --key out.")
        return _read_npy(path)
    held = dict(_tensors(read_without_running(path)))
    told = ", ".join(f"{name or 'the tensor itself'} {shape(tensor)}" for name, tensor in list(held.items())[:12])
    told += f", and {len(held) - 12} more" if len(held) > 12 else ""
    if key is not None:
        if key not in held:
            raise InputError(f"{path} holds no tensor {key!r}.{nearest(key, held)}")
        return held[key]
    if not held:
        raise InputError(f"{path} holds no tensor.")
    if len(held) > 1:
        raise InputError(f"{path} holds {len(held)} tensors ({told}): say with --key which are the centroids.")
    return next(iter(held.values()))


def _read_npy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise InputError(
                f"{path} holds pickled objects, and reading them could run code, so it is refused. "
                "Save the centroids as a plain float array."
            ) from error
        raise InputError(f"{path} cannot be read as an .npy file: {error}. Is it damaged?") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read as an .npy file: {error}. Is it damaged?") from error
    if array.dtype.kind not in "fiub":
        raise InputError(f"{path} holds {array.dtype} values; centroids are real numbers.")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings and lists, with its dotted name."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list | tuple):
        for place, value in enumerate(content):
            yield from _tensors(value, f"{name}.{place}" if name else str(place))


def checked_centroids(
    centroids: Shaped[Tensor, "..."], features: PatchFeatures, where: str = "The centroids"
) -> Float[Tensor, "k d"]:
    """The table as float32, if it is one that these features can be compared with.

    Raises
    ------
    InputError
        Not K × D floats with the D of the features and K of at least 2, or NaN or infinity among them.
    """
    of = (
        f"the features `{features.spec}` (patch side {features.patch_size}, {features.channels} channel(s)) "
        f"have D = {features.dim}"
    )
    if centroids.ndim != 2:
        raise InputError(f"{where} have shape {shape(centroids)}; a table (K, D) is needed, and {of}.")
    if not centroids.is_floating_point():
        raise InputError(
            f"{where} are {str(centroids.dtype).removeprefix('torch.')}; floats are needed, on the scale of the "
            "features. Convert them first."
        )
    size, dim = centroids.shape
    if dim != features.dim:
        hint = (
            f" Transposed, {shape(centroids.t())} would fit: save it so, and import it again."
            if size == features.dim
            else " Name the features, patch side and channels with which they were made."
        )
        raise InputError(f"{where} have shape {shape(centroids)}, that is {size} of {dim} numbers; {of}.{hint}")
    if size < 2:
        raise InputError(f"{where} have shape {shape(centroids)}: one centroid tells no patches apart; K is 2 or more.")
    table = centroids.detach().cpu().float()
    bad = ~torch.isfinite(table).all(1)
    if bool(bad.any()):
        raise InputError(
            f"{where} hold NaN or infinity in {int(bad.sum())} of {size} rows, the first in row "
            f"{int(bad.nonzero()[0, 0])}. Repair or remove them first."
        )
    return table


def import_centroids(
    centroids: Shaped[Tensor, "..."],
    features: str | PatchFeatures,
    *,
    patch_size: int,
    view: ViewConfig,
    metric: Metric = "l2",
    where: str = "The centroids",
) -> KMeansTokenizer:
    """A tokenizer from a table of centroids that was made elsewhere.

    Parameters
    ----------
    centroids
        (K, D) float, D the dimension of the features.
    features
        What patches are described by, as a spec or ready made.
    patch_size
        Patch side P in pixels.
    view
        Size and channels of the images; mean and std by which `pixel` features are normalised.
    metric
        How a patch is compared with the centroids: ``"l2"``, ``"cosine"``, or ``"dot"`` (largest inner product).
    where
        What error messages call the centroids.

    Raises
    ------
    InputError
        The features cannot be made, or the centroids do not fit them (see `checked_centroids`).
    """
    described = make_features(features, patch_size=patch_size, view=view)
    if described.needs_fit:
        raise InputError(
            f"Centroids cannot be imported for features `{described.spec}`, which are made to the measure of training "
            "images that are not here (whitening, scales of a join, pca). Name features without, such as a join with "
            "|balance=false, or pass fitted features in Python."
        )
    if described.needs_fit:
        raise InputError(
            f"Features `{described.spec}` are made to the measure of training images, which a table of centroids does "
            "not bring. In Python, give features that were fitted: import_tokenizer(.., features=tokenizer.features)."
        )
    table = checked_centroids(centroids, described, where)
    config = {
        "vocab_size": len(table),
        "patch_size": patch_size,
        "channels": view.channels,
        "image_size": list(view.image_size),
        "features": described.config(),
        "dim": described.dim,
        "metric": metric,
        "facts": {
            "imported": True,
            "centroids_sha256": hashlib.sha256(table.numpy().tobytes()).hexdigest(),
            "spec": described.spec,
            "metric": metric,
            "versions": environment_facts()["versions"],
        },
    }
    return KMeansTokenizer(config, described, Codebook(table, metric))
