"""What no training at all achieves: encoders that every pretrained one must beat."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clustermim.data.views import ViewConfig
from clustermim.encoders.contract import Encoder, EncoderOutput
from clustermim.errors import InputError

RAW_SIDE = 32
"""Longest side of the raw-pixels floor: 3,072 numbers a colour image, as in CIFAR, whatever the photo's size."""


class RawPixels(Encoder):
    """The image itself as its feature vector, averaged down to at most `side` pixels a side.

    Parameters
    ----------
    name
        What tables call it.
    channels
        Of the images.
    side
        Longest side kept; smaller images stay as they are.
    mean, std
        Per-channel statistics of the images.
    """

    global_name = "pixels"

    def __init__(
        self,
        name: str = "raw-pixels",
        *,
        channels: int,
        side: int = RAW_SIDE,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(name, image_size=None, channels=channels, mean=mean, std=std)
        self.side = side

    def encode(self, images: Tensor, which: Sequence[int]) -> list[EncoderOutput]:
        """(B, C·h·w): the pixels, flattened."""
        height, width = images.shape[-2:]
        scale = self.side / max(height, width)
        if scale < 1:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            images = torch.nn.functional.adaptive_avg_pool2d(images, size)
        return [EncoderOutput(cls=images.flatten(1), patches=None) for _ in which]


def open_raw_pixels(spec: str, rest: str, options: Mapping[str, str], view: ViewConfig | None) -> RawPixels:
    """`raw-pixels`: see `RawPixels`.

    Raises
    ------
    InputError
        No view to take the channels and statistics from.
    """
    if view is None:
        raise InputError("raw-pixels takes its channels and statistics from the images: pass `view`.")
    return RawPixels(spec, channels=view.channels, mean=view.mean, std=view.std)
