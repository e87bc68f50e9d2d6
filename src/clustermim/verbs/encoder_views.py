"""What there is to see of an encoder on data: patch features, neighbours, attention of the class token."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from clustermim.data.loaders import make_loader
from clustermim.data.sources import ImageSource
from clustermim.data.views import eval_view
from clustermim.encoders.contract import Encoder
from clustermim.evaluation.evaluating import view_for
from clustermim.render.sheets import to_rgb


@dataclass(frozen=True, kw_only=True)
class EncoderView:
    """What an encoder makes of images. Of `vectors` every image has one; the rest is of the images shown."""

    name: str
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]] = field(repr=False)
    """The images shown."""
    captions: Sequence[str]
    """Their classes, or numbers."""
    patches: Float[np.ndarray, "shown n d"] | None = field(repr=False)
    """Their patch features at the last layer; None where the encoder has no grid of patches."""
    grid: tuple[int, int]
    attention: Float[np.ndarray, "shown n"] | None = field(repr=False)
    """Attention of the class token on each patch in the last block, mean over heads; None where it cannot be had."""
    vectors: Float[np.ndarray, "images d"] = field(repr=False)
    """Global vector of every image: the class token, or the mean of the patches where there is none."""
    pool: str
    """Which of the two: `cls` or `mean`."""
    labels: Int64[np.ndarray, " images"] | None
    classes: Sequence[str] | None
    neighbours: Sequence[tuple[int, Sequence[int]]]
    """Query -> its nearest other images by cosine similarity, the nearest first; places in the source."""


@torch.no_grad()
def look_at_encoder(
    encoder: Encoder,
    source: ImageSource,
    *,
    examples: int = 12,
    nearest: int = 6,
    device: str = "cpu",
    batch_size: int = 64,
) -> EncoderView:
    """Run an encoder over a source (eval view) and gather what there is to see.

    Parameters
    ----------
    encoder
        Any.
    source
        Images; all of them get a global vector.
    examples
        How many are shown.
    nearest
        How many neighbours a query gets.
    device
        Where to compute.
    batch_size
        Images at a time.

    Raises
    ------
    InputError
        The encoder does not take the channels of the images.
    """
    view = view_for(encoder, source.view)
    encoder = encoder.to(device).eval()
    chosen = choose_examples(source, examples)
    vectors, pool = [], "cls"
    for batch in make_loader(source, view, batch_size=batch_size, train=False, device=device).epoch():
        pooled = encoder(batch.images).pooled(encoder.global_name)
        pool = next(iter(pooled))
        vectors.append(pooled[pool].float().cpu())
    every = torch.cat(vectors)
    images = torch.stack([eval_view(source[i][0], view) for i in chosen]).to(device)
    patches = encoder(images).patches
    grid = getattr(encoder, "patch_grid", lambda *_: None)(*view.image_size)
    if grid is None or patches is None or patches.shape[1] != grid[0] * grid[1]:
        patches, grid = None, (1, 1)
    attention = class_attention(encoder, images)
    return EncoderView(
        name=encoder.name,
        pictures=[to_rgb(image.cpu().numpy()) for image in images],
        captions=[caption(source, i) for i in chosen],
        patches=None if patches is None else patches.float().cpu().numpy(),
        grid=grid,
        attention=None if attention is None else attention.float().cpu().numpy(),
        vectors=every.numpy(),
        pool=pool,
        labels=source.labels,
        classes=source.classes,
        neighbours=_neighbours(every, chosen, nearest),
    )


def choose_examples(source: ImageSource, count: int) -> list[int]:
    """Places of images to show: the classes in turn where there are any, else spread evenly."""
    count = min(count, len(source))
    if source.labels is None:
        return [int(i) for i in np.linspace(0, len(source) - 1, count)]
    order = np.argsort(source.labels, kind="stable")
    starts = np.searchsorted(source.labels[order], source.labels[order], side="left")
    turn = np.arange(len(order)) - starts
    return [int(i) for i in order[np.argsort(turn, kind="stable")][:count]]


def caption(source: ImageSource, place: int) -> str:
    """The class of an image, or its number where there is none."""
    if source.labels is None or source.classes is None:
        return f"image {place}"
    name = source.classes[int(source.labels[place])]
    return f"class {name}" if name.isdigit() else name


def picture_of(source: ImageSource, place: int, encoder: Encoder) -> UInt8[np.ndarray, "h w 3"]:
    """One image as the encoder is given it."""
    return to_rgb(eval_view(source[place][0], view_for(encoder, source.view)).numpy())


def class_attention(encoder: Encoder, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"] | None:
    """How much the class token attends to each patch in the last block, averaged over heads; rows sum to less than 1.

    What is left of 1 is the attention on the class token itself. None for anything but a plain timm ViT: others have no
    class token, or add to the attention what this does not compute.
    """
    model: Any = getattr(encoder, "model", None)
    blocks = getattr(model, "blocks", None)
    if blocks is None or getattr(model, "cls_token", None) is None:
        return None
    layer: Any = getattr(blocks[-1], "attn", None)
    if type(layer).__name__ != "Attention" or type(model).__name__ != "VisionTransformer":
        return None
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        encoder(images)
    finally:
        hook.remove()
    tokens = seen[0]
    batch, count, width = tokens.shape
    heads = int(layer.num_heads)
    query, key, _ = layer.qkv(tokens).reshape(batch, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    query, key = layer.q_norm(query), layer.k_norm(key)
    weights = torch.softmax(query[:, :, :1] @ key.transpose(-2, -1) * layer.scale, dim=-1)
    result: Tensor = weights[:, :, 0, int(model.num_prefix_tokens) :].mean(dim=1)
    return result


def _neighbours(vectors: Tensor, queries: Sequence[int], count: int) -> list[tuple[int, list[int]]]:
    """For each query the most similar other images."""
    unit = torch.nn.functional.normalize(vectors, dim=1)
    likeness = unit[list(queries)] @ unit.T
    likeness[torch.arange(len(queries)), list(queries)] = -torch.inf
    found = likeness.topk(min(count, len(vectors) - 1), dim=1).indices.tolist()
    return list(zip(queries, found, strict=True))


def limited(source_options: Any, most: int) -> Any:
    """Data options that take at most `most` images unless the user says how many."""
    return replace(source_options, limit=source_options.limit or most)
