"""Dense labels: from a mask image to one class per patch."""

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from clustermim.data.checking import in_threads
from clustermim.data.mask_images import IGNORED, MaskImages
from clustermim.data.views import ViewConfig
from clustermim.errors import InputError


def patch_classes(masks: Int[Tensor, "b h w"], patch_size: int, ignore_index: int = IGNORED) -> Int64[Tensor, "b n"]:
    """The commonest class of each patch.

    Parameters
    ----------
    masks
        Class of each pixel, integers from 0, (B, H, W); patches in row-major order, as tokens are.
    patch_size
        Patch side in pixels; divides H and W.
    ignore_index
        Value of pixels without class. A patch is ignored, −1, when these are its commonest value. Ties go to the lower
        class, and against ignoring.

    Raises
    ------
    InputError
        A patch side that does not divide the mask, or negative classes.
    """
    b, height, width = masks.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise InputError(f"Patches of side {patch_size} do not divide masks of {height} × {width} pixels.")
    if masks.numel() and int(masks.min()) < 0 and ignore_index >= 0:
        raise InputError(f"masks holds negative classes (lowest {int(masks.min())}); say which by ignore_index.")
    rows, columns = height // patch_size, width // patch_size
    cut = masks.to(torch.int64).view(b, rows, patch_size, columns, patch_size).transpose(2, 3)
    values, place = torch.unique(cut.reshape(b, rows * columns, patch_size**2), return_inverse=True)
    # Ignored pixels come last, so that argmax, which takes the first of equals, prefers any class to them.
    order = torch.argsort((values == ignore_index).to(torch.int64), stable=True)
    counts = torch.stack([(place == one).sum(dim=2) for one in order.tolist()], dim=2)
    names = torch.where(values == ignore_index, -1, values)[order]
    return names[counts.argmax(dim=2)]


def mask_labels(
    masks: MaskImages, view: ViewConfig, patch_size: int, ignore_index: int = IGNORED
) -> Int64[np.ndarray, "images n"]:
    """The class of every patch of every image of a source: labels as `score_tokens` takes them.

    Parameters
    ----------
    masks
        Masks of the source.
    view
        How its images are cut, and so their masks.
    patch_size, ignore_index
        As for `patch_classes`.

    Raises
    ------
    InputError
        As `MaskImages.view` and `patch_classes`.
    """

    def of(index: int) -> np.ndarray:
        return np.asarray(patch_classes(masks.view(index, view)[None], patch_size, ignore_index)[0])

    return np.stack(list(in_threads(of, range(len(masks)))))
