"""Patch features: the contract, the spelling `name[@file][?key=value&..]`, and the registry behind it.

A new feature is one file with a `PatchFeatures` class and one line in `_REGISTRY`.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clustermim.data.views import ViewConfig
from clustermim.errors import InputError, nearest

Module = TypeVar("Module", bound=nn.Module)

# name -> class; imported on first use, so that `pixel` does not import timm
_REGISTRY = {
    "pixel": "clustermim.features.pixel:PixelFeatures",
    "backbone": "clustermim.features.backbone:BackboneFeatures",
}


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
    def from_spec(cls, part: "SpecPart", *, patch_size: int, view: ViewConfig) -> "PatchFeatures":
        """Build from one part of a user's spec; may read files or the hub."""

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

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Features of each patch, patches in row-major order.

        Raises
        ------
        InputError
            The images have other channels, or a size that the patch side does not divide.
        """
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


class JoinedFeatures(PatchFeatures):
    """Several features side by side: `a+b` has the dimensions of a, then those of b."""

    def __init__(self, parts: Sequence[PatchFeatures]) -> None:
        first = parts[0]
        spec = "+".join(part.spec for part in parts)
        dim = sum(part.dim for part in parts)
        super().__init__(spec, patch_size=first.patch_size, channels=first.channels, dim=dim)
        self.parts = nn.ModuleList(parts)

    @classmethod
    def from_spec(cls, part: "SpecPart", *, patch_size: int, view: ViewConfig) -> "JoinedFeatures":
        """Not registered under a name: `make_features` joins the parts."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "JoinedFeatures":
        """Rebuild each part."""
        return cls([rebuild_features(part) for part in config["parts"]])

    def config(self) -> dict[str, Any]:
        """The configs of the parts."""
        return {"name": "+", "spec": self.spec, "parts": [part.config() for part in self._members()]}

    def describe(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Concatenate along D."""
        return torch.cat([part.describe(images) for part in self._members()], dim=2)

    def _members(self) -> list[PatchFeatures]:
        return [part for part in self.parts if isinstance(part, PatchFeatures)]


@dataclass(frozen=True)
class SpecPart:
    """One part of a spec, taken apart: `backbone:resnet18@w.pth?layer=2` has argument ``resnet18``."""

    text: str
    name: str
    argument: str | None
    file: str | None
    options: Mapping[str, str]

    def check_options(self, known: Sequence[str]) -> None:
        """Refuse options that the feature does not have.

        Raises
        ------
        InputError
            Names the unknown option and the nearest known one.
        """
        for key in self.options:
            if key not in known:
                raise InputError(f"Features `{self.text}`: there is no option {key!r}.{nearest(key, known)}")

    def integer(self, key: str) -> int | None:
        """A whole number, or None where the option is not given. Raises InputError for anything else."""
        if key not in self.options:
            return None
        try:
            return int(self.options[key])
        except ValueError:
            raise InputError(
                f"Features `{self.text}`: {key} must be a whole number, not {self.options[key]!r}."
            ) from None

    def flag(self, key: str) -> bool:
        """True or false; false where the option is not given. Raises InputError for anything else."""
        value = self.options.get(key, "false").lower()
        if value not in ("true", "false", "1", "0", "yes", "no"):
            raise InputError(f"Features `{self.text}`: {key} is true or false, not {self.options[key]!r}.")
        return value in ("true", "1", "yes")


def parse_spec(spec: str) -> list[SpecPart]:
    """Take a spec `name[:argument][@file][?key=value&..]`, parts joined by `+`, apart.

    In a file's path, `+`, `?`, `@` and `%` are written %2B, %3F, %40 and %25.

    Raises
    ------
    InputError
        An empty part, an unknown name (the nearest is given), or options that are no `key=value`.
    """
    parts = []
    for text in spec.split("+"):
        head, _, query = text.strip().partition("?")
        head, _, file = head.partition("@")
        name, _, argument = head.partition(":")
        if name not in _REGISTRY:
            raise InputError(f"There are no patch features called {name!r}.{nearest(name, _REGISTRY)}")
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
        except ValueError:
            raise InputError(f"Features `{text}`: options are written ?key=value&key=value, not ?{query}.") from None
        parts.append(SpecPart(text.strip(), name, argument or None, unquote(file) or None, dict(pairs)))
    return parts


def make_features(spec: "str | PatchFeatures", *, patch_size: int, view: ViewConfig) -> PatchFeatures:
    """Build patch features for images as `view` shows them.

    Parameters
    ----------
    spec
        For example ``"pixel"``, ``"pixel?standardise=true&context=12"``,
        ``"backbone:vit_small_patch16_224@w.pth?layer=9"``, or several joined by ``+``; features already made are
        checked and returned.
    patch_size
        Patch side P in pixels.
    view
        Size, channels, mean and std of the images.

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
    made = [_class_of(p.name).from_spec(p, patch_size=patch_size, view=view) for p in parse_spec(spec)]
    return _settled(made[0] if len(made) == 1 else JoinedFeatures(made))


def rebuild_features(config: Mapping[str, Any]) -> PatchFeatures:
    """Features from their `config`, without weights: load the state dict next.

    Raises
    ------
    InputError
        The config names features that this version does not know.
    """
    name = config.get("name")
    if name == "+":
        return _settled(JoinedFeatures.from_config(config))
    if name not in _REGISTRY:
        raise InputError(f"There are no patch features called {name!r}.{nearest(str(name), _REGISTRY)}")
    return _settled(_class_of(name).from_config(config))


def _class_of(name: str) -> type[PatchFeatures]:
    module, _, attribute = _REGISTRY[name].partition(":")
    found: type[PatchFeatures] = getattr(importlib.import_module(module), attribute)
    return found


def _settled(features: PatchFeatures) -> PatchFeatures:
    return features.requires_grad_(False).eval()
