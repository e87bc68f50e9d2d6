"""Vision transformers in the checkpoints of other projects: found, named, and sized by their tensors alone.

MAE, DINO, iBOT, MoCo v3, BEiT and their like all save a ViT under the same names, inside wrappers of their own
(`model`, `teacher.backbone.`, `module.`). What the tensors do not tell is the number of attention heads.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from clustermim.data.views import ViewConfig
from clustermim.encoders.keymaps import DECODER_ROOTS, is_decoder_key
from clustermim.encoders.weights import FACTS_KEY, load_exactly, read_checkpoint, shape
from clustermim.errors import InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and std that MAE, DINO, iBOT and MoCo take off colour images."""

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Those of BEiT."""

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Width -> attention heads of the usual sizes. MoCo v3's ViT-S has 12."""

DECODER_HEADS = {64: 4, 128: 4, 256: 8, 512: 16}
"""The same for decoders."""

_STOCK = {
    (192, 12): "vit_tiny_patch16_224",
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
    (1280, 32): "vit_huge_patch14_224",
}
_PROJECTION = "patch_embed.proj.weight"
# The weights that are looked at: those that are averaged over training are the better ones, and what papers report.
_PREFERRED = re.compile(r"(^|[._])(ema|teacher|momentum|target)")
_BACKBONE = re.compile(r"^(cls_token|pos_embed|patch_embed\.|blocks\.|norm\.|fc_norm\.|rel_pos_bias\.)")
_HEAD = re.compile(r"^(head|lm_head|head_dist|last_layer|predictor|projector|mask_token|masked_embed|decoder_)")
_BEIT = re.compile(r"(relative_position_bias_table|\.gamma_1|\.attn\.q_bias)$")


@dataclass(frozen=True, kw_only=True)
class ForeignViT:
    """A vision transformer of another project, as timm and we name things."""

    layout: Literal["vit", "beit"]
    name: str
    """A stock timm name."""
    kwargs: dict[str, Any]
    """For `timm.create_model`, beside `num_classes=0`; they survive JSON."""
    encoder: dict[str, Tensor] = field(repr=False)
    """Under timm's keys."""
    decoder: dict[str, Tensor] = field(repr=False)
    """Under the keys of the MAE layout; empty where the file holds no whole decoder."""
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dropped: tuple[str, ...]
    """Names of the heads and mask tokens that were left out."""

    def build(self, where: str) -> nn.Module:
        """The encoder, every weight set.

        Raises
        ------
        InputError
            A tensor does not fit: the first is named, with both shapes.
        """
        try:
            model: nn.Module = timm.create_model(self.name, **self.kwargs, num_classes=0)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise InputError(f"{where}: timm cannot build its {self.name} ({error}).") from error
        what = f"a {self.name} of {self.kwargs['depth']} blocks, {self.kwargs['embed_dim']} wide"
        load_exactly(model, self.encoder, where, what)
        return model.eval()


def read_foreign(
    path: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fallback: ViewConfig | None = None,
) -> ForeignViT:
    """The vision transformer in a checkpoint file.

    Parameters
    ----------
    path
        `.pth` (read without running code) or `.safetensors`.
    image_size
        (height, width) for which position embeddings and relative position biases are resampled (bicubic, by timm);
        None keeps those of the file.
    heads
        Attention heads; None for those of the usual sizes.
    mean, std
        Per channel; None for what the file says, else, for colour, those that its kind of checkpoint was trained with.
    fallback
        Gives mean and std where nothing else does and the channels are the same.

    Raises
    ------
    InputError
        The file cannot be read, would have to run code, holds no such transformer, or leaves open what must be known.
    """
    content = read_checkpoint(path)
    facts = content.get(FACTS_KEY)
    facts = facts if isinstance(facts, Mapping) else {}
    state = _strip(_flatten(content), str(path))
    encoder = {key: value for key, value in state.items() if _BACKBONE.match(key)}
    decoder = {key: value for key, value in state.items() if is_decoder_key(key)}
    if not all(any(key.split(".")[0] == root for key in decoder) for root in DECODER_ROOTS):
        decoder = {}
    dropped = [key for key in state if key not in encoder and key not in decoder]
    unknown = next((key for key in dropped if not _HEAD.match(key)), None)
    if unknown is not None:
        raise InputError(
            f"{path} holds {unknown} {shape(state[unknown])}, which a plain ViT or BEiT has no place for: it is of "
            f"another architecture. Where timm knows it, name it: --format timm --model NAME, or timm:NAME@FILE."
        )
    layout: Literal["vit", "beit"] = "beit" if any(_BEIT.search(key) for key in encoder) else "vit"
    width, channels, side, depth = _sizes(encoder, str(path))
    if heads is None:
        heads = _heads(encoder, facts, width, str(path))
    if width % heads:
        raise InputError(f"{path}: a ViT of width {width} cannot have {heads} attention heads: give a divisor.")
    if image_size is not None and (image_size[0] % side or image_size[1] % side):
        raise InputError(
            f"{path} cuts images into patches of side {side}, which does not divide {image_size[0]} × {image_size[1]}."
        )
    asked = None if image_size is None else (image_size[0] // side, image_size[1] // side)
    grid = _stored_grid(encoder, facts, side, asked, str(path))
    new = asked or grid
    encoder, decoder = _resample(encoder, grid, new), _resample(decoder, grid, new)
    kwargs = {"img_size": [new[0] * side, new[1] * side], "patch_size": side, "in_chans": channels}
    kwargs |= {"embed_dim": width, "depth": depth, "num_heads": heads} | _details(encoder, layout, width)
    if layout == "beit":
        # timm computes the index; where class token and mean are both normed, the class token is what was trained.
        encoder = {k: v for k, v in encoder.items() if not k.endswith("relative_position_index")}
        stock = "beit_large_patch16_224" if width == 1024 else "beit_base_patch16_224"
    else:
        stock = _STOCK.get((width, depth), "vit_tiny_patch16_224")
    if "norm.weight" in encoder:
        encoder = {k: v for k, v in encoder.items() if not k.startswith("fc_norm.")}
    usual: Any = (None, None)
    if channels == 3:
        usual = HALF if layout == "beit" else IMAGENET
    elif fallback is not None and fallback.channels == channels:
        usual = (fallback.mean, fallback.std)
    statistics = [
        _statistic(given, facts.get(key), of, f"--{key}", channels, str(path))
        for given, key, of in ((mean, "mean", usual[0]), (std, "std", usual[1]))
    ]
    return ForeignViT(
        layout=layout,
        name=stock,
        kwargs=kwargs,
        encoder=encoder,
        decoder=decoder,
        image_size=(new[0] * side, new[1] * side),
        channels=channels,
        mean=statistics[0],
        std=statistics[1],
        dropped=tuple(dropped),
    )


def _flatten(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """All tensors of nested mappings under dotted names."""
    flat: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping) and depth < 4:
            flat |= _flatten(value, f"{prefix}{key}.", depth + 1)
    return flat


def _strip(flat: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights of the one transformer that is to be used, without whatever stands before their names."""
    # `model.patch_embed..` and `patch_embed..`, but not `my_patch_embed..`.
    prefixes = [key[: -len(_PROJECTION)] for key in flat if key == _PROJECTION or key.endswith(f".{_PROJECTION}")]
    if not prefixes:
        first = next(iter(flat), None)
        found = "no tensors at all" if first is None else f"{first} {shape(flat[first])} first of {len(flat)} tensors"
        raise InputError(
            f"{where} holds no vision transformer: none of its names ends in {_PROJECTION} (width, channels, P, P); it "
            f"holds {found}. Where timm knows the model, name it: --format timm --model NAME, or timm:NAME@FILE."
        )
    prefix = min(prefixes, key=lambda p: (not _PREFERRED.search(p), len(p)))
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}


def _sizes(state: Mapping[str, Tensor], where: str) -> tuple[int, int, int, int]:
    """(width, channels, patch side, blocks)."""
    projection = state[_PROJECTION]
    if projection.ndim != 4 or projection.shape[2] != projection.shape[3]:
        raise InputError(f"{where}: its {_PROJECTION} is {shape(projection)}, where (width, channels, P, P) is needed.")
    width, channels, side = (int(n) for n in projection.shape[:3])
    if "cls_token" not in state:
        raise InputError(f"{where} holds no cls_token (1, 1, {width}): a ViT without class token cannot be imported.")
    blocks = {int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)}
    if blocks != set(range(len(blocks))) or not blocks:
        raise InputError(f"{where}: its blocks are numbered {sorted(blocks)[:5]}, not 0, 1, 2, ... Is it cut short?")
    return width, channels, side, len(blocks)


def _heads(state: Mapping[str, Tensor], facts: Mapping[str, Any], width: int, where: str) -> int:
    """What the file says, what its relative position biases show, else what models of this width have."""
    if isinstance(facts.get("heads"), int):
        return int(facts["heads"])
    table = next((v for k, v in state.items() if k.endswith("relative_position_bias_table")), None)
    if table is not None:
        return int(table.shape[-1])
    if width not in HEADS:
        raise InputError(
            f"{where}: nothing tells how many attention heads a ViT of width {width} has. Give them: --heads N, or "
            f"?heads=N behind mae:FILE."
        )
    return HEADS[width]


def _stored_grid(
    state: Mapping[str, Tensor], facts: Mapping[str, Any], side: int, asked: tuple[int, int] | None, where: str
) -> tuple[int, int]:
    """Patches down and across that the positions in the file are for."""
    known = facts.get("image_size")
    if isinstance(known, Sequence) and len(known) == 2:
        return int(known[0]) // side, int(known[1]) // side
    table = next((v for k, v in state.items() if k.endswith("relative_position_bias_table")), None)
    if "pos_embed" in state:
        positions = state["pos_embed"].shape[1] - 1
        edge = math.isqrt(positions)
        fits = asked is not None and asked[0] * asked[1] == positions
    elif table is not None:
        # (2h - 1)(2w - 1) distances, and three for the class token.
        positions = int(table.shape[0]) - 3
        edge = (math.isqrt(positions) + 1) // 2
        fits = asked is not None and (2 * asked[0] - 1) * (2 * asked[1] - 1) == positions
        positions = edge * edge if (2 * edge - 1) ** 2 == positions else -1
    else:
        raise InputError(f"{where} holds neither pos_embed nor relative position biases: it is no ViT or BEiT of ours.")
    if edge * edge == positions:
        return edge, edge
    if fits and asked is not None:
        return asked
    raise InputError(
        f"{where}: its position embeddings are not those of a square image. Give the size that it was trained at first "
        f"(--image-size HEIGHT WIDTH); from there it can be resampled."
    )


def _resample(state: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Tensor]:
    """The same weights for another grid of patches."""
    if old == new:
        return state
    return {key: _resampled(key, value, old, new) for key, value in state.items()}


def _resampled(key: str, value: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    if key in ("pos_embed", "decoder_pos_embed"):
        return resample_positions(value, old, new)
    if key.endswith("relative_position_bias_table"):
        wanted = ((2 * new[0] - 1) * (2 * new[1] - 1) + 3, value.shape[1])
        resized: Tensor = resize_rel_pos_bias_table(value, new_window_size=new, new_bias_shape=wanted)
        return resized
    return value


def resample_positions(
    positions: Float[Tensor, "1 tokens d"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "1 new_tokens d"]:
    """Position embeddings with a class token for another grid (rows, columns), bicubic with antialiasing, by timm."""
    resampled: Tensor = resample_abs_pos_embed(positions, list(new), old_size=list(old), num_prefix_tokens=1)
    return resampled


def _details(state: Mapping[str, Tensor], layout: str, width: int) -> dict[str, Any]:
    """What else tells timm how the blocks are made; what is timm's default is left out."""
    details: dict[str, Any] = {}
    hidden = state.get("blocks.0.mlp.fc1.weight", torch.empty(4 * width, width)).shape[0]
    if hidden != 4 * width:
        details["mlp_ratio"] = hidden / width
    by_mean = "norm.weight" not in state and "fc_norm.weight" in state
    if layout == "beit":
        details["use_abs_pos_emb"] = "pos_embed" in state
        details["use_rel_pos_bias"] = "blocks.0.attn.relative_position_bias_table" in state
        details["use_shared_rel_pos_bias"] = "rel_pos_bias.relative_position_bias_table" in state
        details["init_values"] = 0.1 if "blocks.0.gamma_1" in state else None
        details["qkv_bias"] = "blocks.0.attn.q_bias" in state
        details["global_pool"] = "avg" if by_mean else "token"
        return details
    if by_mean:
        details["global_pool"] = "avg"
    if "blocks.0.attn.qkv.bias" not in state:
        details["qkv_bias"] = False
    if "blocks.0.ls1.gamma" in state:
        details["init_values"] = 1e-5
    return details


def _statistic(
    given: Sequence[float] | None, stored: Any, usual: Sequence[float] | None, name: str, channels: int, where: str
) -> tuple[float, ...]:
    values = next((v for v in (given, stored, usual) if v is not None), None)
    if values is None:
        raise InputError(
            f"{where} was made for {channels} channel(s), and nothing tells its mean and std: give --mean and --std "
            f"for images in [0, 1]."
        )
    values = tuple(float(v) for v in values)
    values = values * channels if len(values) == 1 else values
    if len(values) != channels or (name == "--std" and min(values) <= 0):
        raise InputError(f"{name} {values} does not fit {where}, which was made for {channels} channel(s).")
    return values
