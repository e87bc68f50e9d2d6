"""Patch features: the contract, and the registry behind the names in a spec (`spelling.py`).

A new feature is one file with a `NamedFeatures` class and one line in `_REGISTRY`.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from clustermim.data.views import ViewConfig
from clustermim.errors import InputError, nearest
from clustermim.features.moments import ImagePasses
from clustermim.features.spelling import SpecPart, parse_spec

Module = TypeVar("Module", bound=nn.Module)

# name -> class; imported on first use, so that `pixel` does not import timm
_REGISTRY = {
    "pixel": "clustermim.features.pixel:PixelFeatures",
    "hog": "clustermim.features.hog:HOGFeatures",
    "backbone": "clustermim.features.backbone:BackboneFeatures",
    "run": "clustermim.features.run_encoder:RunFeatures",
}
_CLASSES = _REGISTRY | {"+": "clustermim.features.joining:JoinedFeatures"}  # which a user does not name


def patchify(images: Float[Tensor, "b c h w"], patch_size: int) -> Float[Tensor, "b n d"]:
    """Cut images into patches: (B, N, P·P·C), patches row-major, in each patch rows, then columns, then channels.

    Raises
    ------
    InputError
        The patch side does not divide the image.
    """
    b, c, height, width = images.shape
    check_divides(height, width, patch_size)
    p = patch_size
    tiles = images.reshape(b, c, height // p, p, width // p, p)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(b, (height // p) * (width // p), p * p * c)


def unpatchify(patches: Float[Tensor, "b n d"], grid: tuple[int, int], patch_size: int) -> Float[Tensor, "b c h w"]:
    """The inverse of `patchify`; `grid` is the number of patches down and across.

    Raises
    ------
    InputError
        The patches do not fill the grid, or D is not a multiple of P·P.
    """
    b, n, d = patches.shape
    rows, columns = grid
    p = patch_size
    if n != rows * columns or d % (p * p):
        raise InputError(f"{n} patches of {d} values are not a {rows} × {columns} grid of patches of side {p}.")
    tiles = patches.reshape(b, rows, columns, p, p, d // (p * p))
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(b, d // (p * p), rows * p, columns * p)


def check_divides(height: int, width: int, patch_size: int) -> None:
    """Check that patches tile an image.

    Raises
    ------
    InputError
        They do not; the sides that would are named.
    """
    if patch_size >= 1 and height % patch_size == 0 and width % patch_size == 0:
        return
    sides = [p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
    raise InputError(
        f"A patch side of {patch_size} does not divide images of {height} × {width} pixels. "
        f"Patch sides that do: {', '.join(map(str, sides))}."
    )


class PatchFeatures(nn.Module, ABC):
    """Describes each patch by D numbers: images (B, C, H, W) in [0, 1] to (B, N, D).

    Never trained: always in evaluation mode, no parameter asks for a gradient. Everything it needs is in its `config`
    and its state dict, so that a tokenizer made with it can be rebuilt without the hub and without the user's files.

    Parameters
    ----------
    spec
        As the user wrote it.
    patch_size
        Patch side P in pixels.
    channels
        Channels C of the images.
    dim
        D, features a patch.
    """

    def __init__(self, spec: str, *, patch_size: int, channels: int, dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.patch_size = patch_size
        self.channels = channels
        self.dim = dim

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PatchFeatures":
        """Build from what `config` returned; the state dict is loaded afterwards."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-able; together with the state dict it rebuilds the features. Must hold the key ``name``."""

    @abstractmethod
    def describe(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """The features of checked images."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a patch is described alike to the last bit in whatever batch its image stands.

        Not so where a matrix product goes over the whole batch: its rows may be rounded otherwise at another place.
        """
        return False

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` must see the training images before the first patch can be described."""
        return False

    def fit(self, images: ImagePasses) -> dict[str, Any]:
        """Learn from the training images what cannot be known without them; where `needs_fit`, before anything else.

        What was learnt is part of the state dict, and `config` says that it is there.

        Parameters
        ----------
        images
            Called once a pass over the images, which yields them in batches of any size.

        Returns
        -------
        dict
            JSON-able facts worth noting beside the features; empty where there is nothing to fit.

        Raises
        ------
        InputError
            There are no images, or what was to be fitted has no variance.
        """
        return {}

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Features of each patch, patches in row-major order.

        Raises
        ------
        InputError
            The images have other channels, or a size that the patch side does not divide; or the features wait for
            their `fit`.
        """
        if self.needs_fit:
            raise InputError(
                f"Features `{self.spec}` are made to the measure of the training images: call their fit(..) first, or "
                "take them from a tokenizer that `clustermim tokenizer fit` has made."
            )
        if images.shape[1] != self.channels:
            raise InputError(
                f"Features `{self.spec}` were made for images of {self.channels} channel(s); these have "
                f"{images.shape[1]}. Open the images with --channels {self.channels}, or make the features anew."
            )
        check_divides(images.shape[2], images.shape[3], self.patch_size)
        return self.describe(images)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across for an image of this size.

        Raises
        ------
        InputError
            The patch side does not divide the image.
        """
        check_divides(height, width, self.patch_size)
        return height // self.patch_size, width // self.patch_size

    def train(self: Module, mode: bool = True) -> Module:
        """Stays in evaluation mode: batch statistics of a training loop must not change what a patch is called."""
        return nn.Module.train(self, False)


class NamedFeatures(PatchFeatures):
    """Features that a user's spec names."""

    @classmethod
    @abstractmethod
    def from_spec(cls, part: SpecPart, *, patch_size: int, view: ViewConfig) -> "NamedFeatures":
        """Build from one part of a user's spec; may read files or the hub."""


def make_features(
    spec: "str | PatchFeatures", *, patch_size: int, view: ViewConfig, base: Path | None = None
) -> PatchFeatures:
    """Build patch features for images as `view` shows them.

    Parameters
    ----------
    spec
        For example ``"pixel"``, ``"pixel?standardise=true&context=12"``, ``"hog"``,
        ``"backbone:vit_small_patch16_224@w.pth?layer=9"``, or several joined by ``+``, with what is done to all of
        them behind ``|``, as in ``"pixel+hog|pca=32"``; features already made are checked and returned.
    patch_size
        Patch side P in pixels.
    view
        Size, channels, mean and std of the images.
    base
        Folder that relative paths in `spec` start from; None: the working directory.

    Raises
    ------
    InputError
        The patch side does not divide the images (the sides that do are named), unknown features or options, or
        weights that cannot be had.
    """
    view.check_patch_size(patch_size)
    if isinstance(spec, PatchFeatures):
        if (spec.patch_size, spec.channels) != (patch_size, view.channels):
            raise InputError(
                f"These features (`{spec.spec}`) are of patches of side {spec.patch_size} with {spec.channels} "
                f"channel(s); wanted are side {patch_size} and {view.channels} channel(s)."
            )
        return spec
    from clustermim.features.joining import JoinedFeatures, JoinOptions  # which build on this file

    parts, tail = parse_spec(spec, base)
    options = JoinOptions.from_spec(tail)
    for part in parts:
        if part.name not in _REGISTRY:
            raise InputError(f"There are no patch features called {part.name!r}.{nearest(part.name, _REGISTRY)}")
    made = [_named(part.name).from_spec(part, patch_size=patch_size, view=view) for part in parts]
    if len(made) == 1 and tail is None:
        return _settled(made[0])
    return _settled(JoinedFeatures(made, options, spec=spec))


def rebuild_features(config: Mapping[str, Any]) -> PatchFeatures:
    """Features from their `config`, without weights: load the state dict next.

    Raises
    ------
    InputError
        The config names features that this version does not know.
    """
    name = str(config.get("name"))
    if name not in _CLASSES:
        raise InputError(f"There are no patch features called {name!r}.{nearest(name, _REGISTRY)}")
    found: type[PatchFeatures] = _load(_CLASSES[name])
    return _settled(found.from_config(config))


def _named(name: str) -> type[NamedFeatures]:
    found: type[NamedFeatures] = _load(_REGISTRY[name])
    return found


def _load(where: str) -> Any:
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _settled(features: PatchFeatures) -> PatchFeatures:
    return features.requires_grad_(False).eval()
