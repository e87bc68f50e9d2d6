"""Which patches are hidden: random masks (MAE) and block-wise masks (BEiT), counted by (seed, epoch, index).

True means hidden. Every row of a mask hides exactly the same number of patches, so visible patches stack into a batch.
"""

import math

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from clustermim.data.counted import Stream, counter_hash, uniform
from clustermim.errors import InputError

_BLOCK_TRIES = 60
_BLOCK_ASPECT = (0.3, 1 / 0.3)


def hidden_count(num_patches: int, ratio: float) -> int:
    """How many of `num_patches` a mask of this ratio hides.

    Raises
    ------
    InputError
        When nothing would be hidden, or nothing would stay visible.
    """
    hidden = round(num_patches * ratio) if math.isfinite(ratio) else -1
    if not 1 <= hidden < num_patches:
        low, high = 1 / num_patches, (num_patches - 1) / num_patches
        advice = (
            f"use a ratio from {low:.3g} to {high:.3g}, a smaller patch or a larger image"
            if num_patches > 1
            else "use a smaller patch or a larger image"
        )
        raise InputError(
            f"A mask ratio of {ratio:g} hides {max(hidden, 0)} of {num_patches} patches of an image, "
            f"but at least one must be hidden and one visible: {advice}."
        )
    return hidden


def random_masks(
    seed: int, epoch: int, index: Int64[Tensor, " b"], num_patches: int, ratio: float
) -> Bool[Tensor, "b {num_patches}"]:
    """Masks that hide a uniformly random set of patches (He et al., "Masked autoencoders", 2022).

    Parameters
    ----------
    seed, epoch
        What the masks are drawn from.
    index
        (B,) index of each image in its source; the masks live on its device.
    num_patches
        N, patches in an image.
    ratio
        Share of patches to hide.

    Returns
    -------
    Tensor
        (B, N) bool, True = hidden, exactly `hidden_count` in every row.
    """
    hidden = hidden_count(num_patches, ratio)
    patches = torch.arange(num_patches, device=index.device)
    keys = counter_hash(seed, Stream.MASK, epoch, index[:, None], patches)
    return _lowest(keys, torch.full_like(index, hidden))


def part_of_masks(
    seed: int, epoch: int, index: Int64[Tensor, " b"], mask: Bool[Tensor, "b n"], count: int
) -> Bool[Tensor, "b n"]:
    """A random part of the hidden patches: those that a model shall predict where it need not predict all.

    Parameters
    ----------
    seed, epoch, index
        As for `random_masks`.
    mask
        (B, N) True where a patch is hidden.
    count
        How many to choose in every row, at most as many as are hidden.

    Returns
    -------
    Tensor
        (B, N) bool, True at `count` of the hidden patches of each row.
    """
    patches = torch.arange(mask.shape[1], device=index.device)
    keys = counter_hash(seed, Stream.PART, epoch, index[:, None], patches)
    return _lowest(keys.where(mask, torch.iinfo(torch.int64).max), torch.full_like(index, count))


def block_masks(
    seed: int, epoch: int, index: Int64[Tensor, " b"], grid: tuple[int, int], ratio: float
) -> Bool[Tensor, "b n"]:
    """Masks made of rectangles (Bao et al., "BEiT", 2022, algorithm 1), trimmed to exactly the same count in every row.

    Rectangles of random area and aspect are added as long as they fit into what is left to hide; what no rectangle
    fills is taken from the patches that border the hidden ones, so that the count is exact.

    Parameters
    ----------
    seed, epoch
        What the masks are drawn from.
    index
        (B,) index of each image in its source.
    grid
        (rows, columns) of patches.
    ratio
        Share of patches to hide.

    Returns
    -------
    Tensor
        (B, rows * columns) bool, row-major, True = hidden, exactly `hidden_count` in every row.
    """
    rows, columns = grid
    total = rows * columns
    wanted = hidden_count(total, ratio)
    smallest = max(1.0, total / 12)
    row = torch.arange(rows, device=index.device)[None, :, None]
    column = torch.arange(columns, device=index.device)[None, None, :]
    mask = torch.zeros(len(index), rows, columns, dtype=torch.bool, device=index.device)
    left = torch.full_like(index, wanted)
    low, high = math.log(_BLOCK_ASPECT[0]), math.log(_BLOCK_ASPECT[1])
    for attempt in range(_BLOCK_TRIES):
        u = uniform(
            seed, Stream.BLOCK, epoch, index[:, None], torch.arange(4, device=index.device) + 4 * attempt
        ).double()
        area = smallest + u[:, 0] * (left - smallest).clamp(min=0)
        aspect = torch.exp(low + u[:, 1] * (high - low))
        height = (area * aspect).sqrt().round().clamp(1, rows).long()
        width = (area / aspect).sqrt().round().clamp(1, columns).long()
        top = (u[:, 2] * (rows - height + 1)).long()[:, None, None]
        start = (u[:, 3] * (columns - width + 1)).long()[:, None, None]
        block = (row >= top) & (row < top + height[:, None, None])
        block = block & (column >= start) & (column < start + width[:, None, None])
        fresh = (block & ~mask).flatten(1).sum(1)
        fits = (fresh > 0) & (fresh <= left)
        mask |= block & fits[:, None, None]
        left = left - torch.where(fits, fresh, 0)
        if not bool((left > 0).any()):
            return mask.flatten(1)
    border = torch.nn.functional.max_pool2d(mask[:, None].float(), 3, stride=1, padding=1)[:, 0].bool()
    keys = counter_hash(seed, Stream.BLOCK, epoch, index[:, None], -1 - torch.arange(total, device=index.device))
    keys = (
        ((keys >> 3) & ((1 << 60) - 1)) + (~border.flatten(1)).long() * (1 << 60) + mask.flatten(1).long() * (1 << 61)
    )
    return mask.flatten(1) | _lowest(keys, left)


def _lowest(keys: Int64[Tensor, "b n"], count: Int64[Tensor, " b"]) -> Bool[Tensor, "b n"]:
    """True at the `count` lowest keys of each row."""
    order = keys.argsort(dim=1, stable=True)
    taken = torch.arange(keys.shape[1], device=keys.device)[None, :] < count[:, None]
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(1, order, taken)
