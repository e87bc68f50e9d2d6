"""Named encoder sizes: what each tells `timm.create_model`, the fixed positions, and the decoder that goes with it.

Each preset is a stock timm model name plus keyword arguments, so that timm alone can rebuild the encoder of any run.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from clustermim.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One encoder size and the decoder that goes with it."""

    timm_name: str
    dim: int
    depth: int
    heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int


PRESETS: dict[str, Preset] = {
    # For images of 8 to 32 pixels a side: minutes on two CPU cores.
    "vit_micro": Preset(
        timm_name="vit_tiny_patch16_224",
        dim=128, depth=6, heads=4, decoder_dim=64, decoder_depth=2, decoder_heads=4,
    ),
    "vit_ti": Preset(
        timm_name="vit_tiny_patch16_224",
        dim=192, depth=12, heads=3, decoder_dim=128, decoder_depth=4, decoder_heads=4,
    ),
    "vit_s": Preset(
        timm_name="vit_small_patch16_224",
        dim=384, depth=12, heads=6, decoder_dim=256, decoder_depth=8, decoder_heads=8,
    ),
    "vit_b": Preset(
        timm_name="vit_base_patch16_224",
        dim=768, depth=12, heads=12, decoder_dim=512, decoder_depth=8, decoder_heads=16,
    ),
    "vit_l": Preset(
        timm_name="vit_large_patch16_224",
        dim=1024, depth=24, heads=16, decoder_dim=512, decoder_depth=8, decoder_heads=16,
    ),
}  # fmt: skip

ALIASES = {"vit_tiny": "vit_ti", "vit_small": "vit_s", "vit_base": "vit_b", "vit_large": "vit_l"}


def find_preset(model: str) -> Preset | None:
    """The preset called `model` (an alias such as `vit_small` counts), or None when it is not one of ours."""
    return PRESETS.get(ALIASES.get(model, model))


def model_kwargs(
    model: str, image_size: int | tuple[int, int], patch_size: int, channels: int
) -> tuple[str, dict[str, Any]]:
    """What rebuilds the encoder: ``timm.create_model(name, **kwargs, num_classes=0)``.

    Parameters
    ----------
    model
        A preset (`vit_micro`, `vit_ti`, `vit_s`, `vit_b`, `vit_l`, or `vit_tiny` .. `vit_large`) or the name of any
        timm `VisionTransformer` with a class token, no registers and a final norm.
    image_size
        Side, or (height, width), in pixels.
    patch_size
        Patch side in pixels; it must divide both sides of the image.
    channels
        Channels of the image.

    Returns
    -------
    tuple[str, dict]
        A stock timm name and keyword arguments that survive JSON.

    Raises
    ------
    InputError
        Unknown model, a timm model that masked pretraining cannot use, or a patch side that does not divide the image.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if patch_size < 1 or height % patch_size or width % patch_size:
        fitting = [p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
        raise InputError(
            f"A patch side of {patch_size} does not divide an image of {height} × {width} pixels. "
            f"Patch sides that do: {', '.join(map(str, fitting))}."
        )
    kwargs: dict[str, Any] = {"img_size": [height, width], "patch_size": patch_size, "in_chans": channels}
    preset = find_preset(model)
    if preset is None:
        _check_stock(model)
        return model, kwargs
    return preset.timm_name, {**kwargs, "embed_dim": preset.dim, "depth": preset.depth, "num_heads": preset.heads}


def decoder_defaults(model: str) -> dict[str, int]:
    """Size of the decoder that goes with `model`: ``{"dim", "depth", "heads"}``.

    ViT-S gets 256-d, 8 blocks, 8 heads; ViT-B and up 512-d, 8 blocks, 16 heads (as in MAE); smaller encoders get
    smaller ones. A timm model is treated as the preset whose width is nearest below its own.

    Raises
    ------
    InputError
        Unknown model (the nearest is named).
    """
    preset = find_preset(model)
    if preset is None:
        width = _check_stock(model)
        fitting = [p for p in PRESETS.values() if p.dim <= width] or [PRESETS["vit_micro"]]
        preset = max(fitting, key=lambda p: p.dim)
    return {"dim": preset.decoder_dim, "depth": preset.decoder_depth, "heads": preset.decoder_heads}


def default_patch_size(image_size: tuple[int, int]) -> int:
    """The patch side for images of (height, width) when nobody says: about an eighth of the short side, 2 to 16 pixels.

    Of the sides that divide the image, the one nearest to it: 2 for digits (8 × 8), 4 for 32 × 32, 16 from 128 on.
    """
    height, width = image_size
    wish = min(16, max(2, min(height, width) // 8))
    fitting = [p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
    return min(fitting, key=lambda p: (abs(p - wish), p))


def closest(name: str, choices: Iterable[str]) -> str:
    """The hint alone, " Did you mean 'x'?", for choices too many to print; empty if nothing is near."""
    return nearest(name, choices).split(" Known:")[0]


def sincos_positions(grid: tuple[int, int], dim: int, cls: bool = True) -> Float[Tensor, "1 tokens {dim}"]:
    """Fixed two-dimensional sine-cosine positions, patches in row-major order.

    A quarter of the dimensions each: sine and cosine of the column, then sine and cosine of the row, at `dim / 4`
    wavelengths from 2π to 10,000·2π patches (Vaswani et al. 2017, extended to two axes as in MoCo v3 and MAE, whose
    order of dimensions this keeps).

    Parameters
    ----------
    grid
        Patches down, patches across.
    dim
        Width of the tokens; divisible by 4.
    cls
        Whether a row of zeros for the class token comes first.

    Raises
    ------
    InputError
        `dim` is not divisible by 4.
    """
    if dim % 4:
        raise InputError(f"Two-dimensional sine-cosine positions need a width divisible by 4, not {dim}.")
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    frequencies = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def waves(coordinate: Tensor) -> Tensor:
        angles = coordinate[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across = waves(columns)[None, :, :].expand(grid[0], -1, -1)
    down = waves(rows)[:, None, :].expand(-1, grid[1], -1)
    patches = torch.cat([across, down], dim=2).reshape(grid[0] * grid[1], dim)
    prefix = patches.new_zeros(1 if cls else 0, dim)
    return torch.cat([prefix, patches])[None].float()


@functools.cache
def _check_stock(model: str) -> int:
    """The width of a timm model that masked pretraining can use; InputError when there is none of that name."""
    if not timm.is_model(model):
        raise InputError(
            f"There is no model called {model!r}.{closest(model, known_models())} Known: {', '.join(PRESETS)}, and any "
            f"plain vision transformer that timm.list_models('vit_*') names."
        )
    try:
        with torch.device("meta"):
            built = timm.create_model(model, num_classes=0)
    except Exception as error:
        raise InputError(f"timm cannot build {model!r}: {error}") from error
    problem = None
    if type(built) is not VisionTransformer:
        problem = f"is a {type(built).__name__}, not a VisionTransformer"
    elif built.cls_token is None or built.num_prefix_tokens != 1:
        problem = "does not have exactly one class token before its patches"
    elif isinstance(built.norm, torch.nn.Identity) or built.pos_embed is None or built.no_embed_class:
        problem = "has no final norm, or no position embedding for every token"
    if problem is not None:
        raise InputError(
            f"The timm model {model!r} {problem}, so it cannot be pretrained by masking here. "
            f"Use a preset ({', '.join(PRESETS)}) or a plain ViT such as 'vit_small_patch16_224'."
        )
    width: Any = built.embed_dim
    return int(width)


@functools.cache
def known_models() -> tuple[str, ...]:
    """Names for error messages: the presets, their aliases, and timm's vision transformers."""
    return (*PRESETS, *ALIASES, *timm.list_models("vit_*"))
