"""Which patches are meant: a mask taken apart into positions, and the rows at positions gathered."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from clustermim.errors import InputError


def normalise(
    patches: Float[Tensor, "b n d"], mean: Float[Tensor, " c"], std: Float[Tensor, " c"]
) -> Float[Tensor, "b n d"]:
    """Take each channel's mean and standard deviation off patches whose channels come last, as `patchify` cuts them."""
    pixels = patches.reshape(*patches.shape[:2], -1, len(mean))
    return ((pixels - mean) / std).flatten(2)


def split_mask(
    mask: Bool[Tensor, "b n"], hidden: int | None = None
) -> tuple[Int64[Tensor, "b v"], Int64[Tensor, "b hidden"]]:
    """Where the visible and the hidden patches of each image are, each in row-major order.

    Parameters
    ----------
    mask
        True where a patch is hidden.
    hidden
        Hidden patches in each row. Where None, they are counted, and unequal rows are refused.

    Raises
    ------
    InputError
        The rows hide different numbers of patches.
    """
    if hidden is None:
        counts = mask.sum(dim=1)
        hidden = int(counts[0])
        if not bool((counts == hidden).all()):
            raise InputError("The mask hides different numbers of patches in different images; each must hide as many.")
    order = torch.sort(mask.to(torch.uint8), dim=1, stable=True).indices
    return order[:, : mask.shape[1] - hidden], order[:, mask.shape[1] - hidden :]


def take_rows(values: Float[Tensor, "b n d"], at: Int64[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The rows `at` of each image's table `values`: whole rows are copied, which beats an element-wise gather."""
    batch, length, width = values.shape
    start = torch.arange(batch, device=at.device)[:, None] * length
    return values.reshape(batch * length, width)[(at + start).flatten()].view(batch, at.shape[1], width)


def channel_table(values: Sequence[float]) -> Float[Tensor, " c"]:
    """A statistic of each channel as a float32 tensor."""
    return torch.tensor(values, dtype=torch.float32)
