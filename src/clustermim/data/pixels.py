"""From stored pixel values to what the package works with: uint8, or float32 in [0, 1], with the wanted channels."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from clustermim.errors import InputError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow


class BadImage(Exception):
    """One image cannot be used; the message is the reason, in a few words. Never leaves the data room."""


class OutOfRange(BadImage):
    """Values without a known full range; carries what was observed."""

    def __init__(self, low: float, high: float, kind: str) -> None:
        super().__init__(f"{kind} values from {low:g} to {high:g}")
        self.low, self.high, self.kind = low, high, kind

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuilt from its three values in another process."""
        return (OutOfRange, (self.low, self.high, self.kind))


def out_of_range_error(where: str, low: float, high: float, kind: str) -> InputError:
    """The message for values that have no known full range."""
    what = "outside 0 to 1" if kind == "float" else "whose full range is not known"
    return InputError(
        f"{where} holds {kind} pixels from {low:g} to {high:g}, {what}: say which values are black and white, "
        f"for example with --value-range {low:g} {high:g}."
    )


def to_unit(pixels: np.ndarray, value_range: tuple[float, float] | None) -> Shaped[Tensor, "*n c h w"]:
    """Stored values as a tensor: uint8 as it is, everything else as float32 in [0, 1].

    Parameters
    ----------
    pixels
        (C, H, W), or several as (n, C, H, W): uint8, uint16, another integer type, or float.
    value_range
        The values that become 0 and 1; values beyond are clipped. None: the full range of uint8 or uint16, 0 to 1 of
        floats.

    Raises
    ------
    BadImage
        For NaN or infinite pixels; `OutOfRange` for values outside [0, 1] or integers of unknown range.
    """
    if pixels.dtype == np.uint8 and value_range is None:
        return torch.from_numpy(np.require(pixels, requirements=("C", "W")))
    kind = "float" if pixels.dtype.kind == "f" else str(pixels.dtype)
    values: np.ndarray[Any, Any] = pixels.astype(np.float64 if pixels.dtype.itemsize > 4 else np.float32)
    if kind == "float" and not np.isfinite(values).all():
        raise BadImage("NaN or infinite pixels")
    if value_range is not None:
        low, high = value_range
        values = np.clip(np.divide(np.subtract(values, low), high - low), 0, 1)
    elif pixels.dtype == np.uint16:
        values = np.divide(values, 65535)
    elif kind != "float" or values.min() < -1e-6 or values.max() > 1 + 1e-6:
        raise OutOfRange(float(values.min()), float(values.max()), kind)
    else:
        values = np.clip(values, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def convertible(channels: int, wanted: int) -> bool:
    """Whether images of so many channels can become images of `wanted` channels."""
    return channels == wanted or {channels, wanted} == {1, 3}


def adapt_channels(image: Shaped[Tensor, "*b c h w"], channels: int) -> Shaped[Tensor, "*b {channels} h w"]:
    """Grey repeated to three channels, or three channels weighed to luma; the dtype stays.

    Raises
    ------
    InputError
        For any other change of the number of channels.
    """
    have = image.shape[-3]
    if have == channels:
        return image
    if not convertible(have, channels):
        raise InputError(
            f"Images of {have} channels cannot become images of {channels}: only 1 and 3 are converted into each "
            f"other. Leave out --channels, or choose the channels beforehand."
        )
    if have == 1:
        return image.expand(*image.shape[:-3], channels, *image.shape[-2:]).contiguous()
    weights = torch.tensor(_LUMA, device=image.device).view(3, 1, 1)
    luma = (image * weights).sum(-3, keepdim=True)
    return luma.round().to(torch.uint8) if image.dtype == torch.uint8 else luma
