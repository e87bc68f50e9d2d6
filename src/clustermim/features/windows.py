"""The window around a patch: square, centred on it, filled by reflection where it reaches beyond the image."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from clustermim.errors import InputError
from clustermim.features.patches import patchify


def windows(images: Float[Tensor, "b c h w"], patch_size: int, window: int, spec: str) -> Float[Tensor, "b n d"]:
    """Cut the window around every patch out: (B, N, window² · C), in a window rows, then columns, then channels.

    Parameters
    ----------
    images
        (B, C, H, W).
    patch_size
        Patch side P in pixels, which divides H and W.
    window
        Side of the window in pixels; with P itself these are the patches.
    spec
        Of the features, for the error message.

    Raises
    ------
    InputError
        The windows at the edge reach further than reflection can fill.
    """
    margin = (window - patch_size) // 2
    if margin == 0:
        return patchify(images, patch_size)
    check_margin(spec, window, patch_size, images.shape[2], images.shape[3])
    padded = functional.pad(images, (margin,) * 4, mode="reflect")
    cut = padded.unfold(2, window, patch_size).unfold(3, window, patch_size)
    return cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # (b, rows, columns, window, window, c)


def check_window(spec: str, window: int, patch_size: int) -> None:
    """Check that a window can be centred on a patch.

    Raises
    ------
    InputError
        It is smaller, or would stand out further on one side.
    """
    if window < patch_size or (window - patch_size) % 2:
        raise InputError(
            f"Features `{spec}`: a window of {window} pixels cannot be centred on patches of side {patch_size}. "
            f"Choose context = {patch_size + 2}, {patch_size + 4}, {patch_size + 6} or further in steps of 2."
        )


def check_margin(spec: str, window: int, patch_size: int, height: int, width: int) -> None:
    """Check that reflection can fill the windows at an image's edge.

    Raises
    ------
    InputError
        They reach further than the image is large.
    """
    margin = (window - patch_size) // 2
    if margin >= min(height, width):
        most = patch_size + 2 * (min(height, width) - 1)
        raise InputError(
            f"Features `{spec}`: a window of {window} pixels reaches {margin} pixels beyond images of "
            f"{height} × {width}, more than reflection can fill. Choose a context of at most {most}."
        )
