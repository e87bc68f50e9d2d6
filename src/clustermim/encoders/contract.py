"""What an encoder is: images in [0, 1] in, one global vector and a row of patch vectors out, at any layer.

Every evaluation takes only this. An encoder stores and applies its own mean and standard deviation, and takes images of
one channel or of three whichever of the two it was made for.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clustermim.errors import InputError

# ITU-R 601, the weights that PIL and torchvision use for grey.
_LUMA = (0.299, 0.587, 0.114)


class EncoderOutput(NamedTuple):
    """Features of a batch at one layer.

    `cls` (B, D) is the global vector (the class token where there is one, else whatever the model itself pools), None
    where the model has none or it is the mean of the patches. `patches` (B, N, D') are row-major, None where the
    encoder has no patches. One of the two is always there.
    """

    cls: Tensor | None
    patches: Tensor | None

    def pooled(self, global_name: str = "cls") -> dict[str, Tensor]:
        """One vector an image, each way there is: `{"cls": (B, D), "mean": (B, D')}`, "mean" over the patches.

        Parameters
        ----------
        global_name
            What to call the global vector; floors have no class token and say what theirs is.
        """
        vectors = {}
        if self.cls is not None:
            vectors[global_name] = self.cls
        if self.patches is not None:
            vectors["mean"] = self.patches.mean(dim=1)
        return vectors


class Encoder(nn.Module, ABC):
    """Base of all encoders.

    Parameters
    ----------
    name
        What tables call it: as the user wrote it.
    image_size
        (height, width) in pixels that it needs; None takes images of any size.
    channels
        Channels it computes with.
    depth
        Number of layers; `layers` takes 0 to depth - 1, as timm's `indices` do.
    mean, std
        Per-channel statistics taken off and divided by; a single one counts for all channels. None leaves pixels alone.

    Raises
    ------
    InputError
        `mean` or `std` are of another length than the channels, or `std` is not positive.
    """

    global_name = "cls"
    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        name: str,
        *,
        image_size: tuple[int, int] | None,
        channels: int,
        depth: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.image_size = None if image_size is None else (int(image_size[0]), int(image_size[1]))
        self.channels = int(channels)
        self.depth = int(depth)
        for key, given, neutral in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = [float(v) for v in (given if given is not None else [neutral])]
            values = values * self.channels if len(values) == 1 else values
            if len(values) != self.channels or (key == "std" and min(values) <= 0):
                raise InputError(
                    f"{name}: {key} {values} does not fit an encoder of {self.channels} channels "
                    f"({self.channels} values are needed{', all positive' if key == 'std' else ''})."
                )
            self.register_buffer(f"_{key}", torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    @abstractmethod
    def encode(self, images: Tensor, which: Sequence[int]) -> list[EncoderOutput]:
        """Features of normalised images at the layers `which` (each 0 to depth - 1), in the order asked for."""

    def forward(self, images: Float[Tensor, "b c h w"]) -> EncoderOutput:
        """Features of the last layer, after the final norm, for images in [0, 1]."""
        return self.layers(images, [self.depth - 1])[0]

    def layers(self, images: Float[Tensor, "b c h w"], which: Sequence[int]) -> list[EncoderOutput]:
        """Features of several layers in one pass, the final norm applied to each.

        Parameters
        ----------
        images
            In [0, 1]; of one channel or three where the encoder has three or one, else of as many as it has.
        which
            Layers from 0 to depth - 1; negative ones count from the end, as in timm.

        Raises
        ------
        InputError
            No such layer, or images of another size or number of channels than the encoder takes.
        """
        for layer in which:
            if not -self.depth <= layer < self.depth:
                raise InputError(f"{self.name} has layers 0 to {self.depth - 1}; there is no layer {layer}.")
        return self.encode(self.prepare(images), [layer % self.depth for layer in which])

    def prepare(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b channels h w"]:
        """Images as the network takes them: its own channels, mean and standard deviation.

        Raises
        ------
        InputError
            Images of another size than `image_size`, or of channels that cannot be turned into the encoder's.
        """
        size = (images.shape[2], images.shape[3])
        if self.image_size is not None and size != self.image_size:
            raise InputError(
                f"{self.name} takes images of {self.image_size[0]} × {self.image_size[1]} pixels, "
                f"not {size[0]} × {size[1]}. Give it views of its own size."
            )
        images = match_channels(images, self.channels, self.name)
        return (images - self._mean) / self._std


def match_channels(images: Float[Tensor, "b c h w"], channels: int, name: str) -> Float[Tensor, "b {channels} h w"]:
    """Grey repeated, or colour reduced to luma (ITU-R 601), where the encoder asks for the other of the two.

    Parameters
    ----------
    images
        In [0, 1].
    channels
        How many are wanted.
    name
        Of the encoder, for the error message.

    Raises
    ------
    InputError
        Any other change of channels: nobody can say which of five channels is red.
    """
    given = images.shape[1]
    if given == channels:
        return images
    if given == 1 and channels == 3:
        return images.expand(-1, 3, -1, -1)
    if given == 3 and channels == 1:
        weights = images.new_tensor(_LUMA).view(1, 3, 1, 1)
        return (images * weights).sum(dim=1, keepdim=True)
    raise InputError(
        f"{name} was made for {channels} channel(s) and the images have {given}. Use an encoder made for {given} "
        f"channels, or convert the images with --channels."
    )
