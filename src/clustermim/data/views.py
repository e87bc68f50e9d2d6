"""Views of an image: random crops and flips for training, one fixed view for everything else, in [0, 1].

Where a crop lies is drawn by `draw(seed, epoch, index)`. Two twins cut it out: `train_view` one image at a time, for
worker processes; `train_views` a whole batch on its device, as two small matrix products per image.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from clustermim.data.counted import Stream, uniform
from clustermim.errors import InputError

_CROP_TRIES = 10  # as in torchvision's RandomResizedCrop


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What a view looks like. Views stay in [0, 1]; whoever consumes them applies `mean` and `std`."""

    image_size: tuple[int, int]
    """(height, width) of a view in pixels."""
    channels: int
    """Channels of a view."""
    mean: tuple[float, ...]
    """Mean of each channel over the training images."""
    std: tuple[float, ...]
    """Standard deviation of each channel; never 0."""
    flip: bool = True
    """Whether training views are mirrored half of the time."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of a training crop's share of the area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a training crop's width over height."""

    def __post_init__(self) -> None:
        """Refuse statistics that do not match the channels."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise InputError(
                    f"--{name} has {len(values)} value(s) but the images have {self.channels} channel(s): "
                    f"give one value for each channel, or leave it out to measure it."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON and YAML."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ViewConfig":
        """The inverse of `to_dict`; unknown keys are ignored, so that later versions' manifests stay readable."""
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in known.items()
        }
        return cls(**fields)

    def check_patch_size(self, patch_size: int) -> None:
        """Check that patches of this side tile a view.

        Raises
        ------
        InputError
            When they do not; names the sides that do.
        """
        height, width = self.image_size
        if patch_size >= 1 and height % patch_size == 0 and width % patch_size == 0:
            return
        sides = [side for side in range(1, min(height, width) + 1) if math.gcd(height, width) % side == 0]
        larger = f"{_round_to(height, patch_size)} {_round_to(width, patch_size)}" if patch_size >= 1 else ""
        resize = f", or resize the images, for example with --image-size {larger}" if larger else ""
        raise InputError(
            f"A patch side of {patch_size} does not divide images of {height}x{width} pixels: use a --patch-size of "
            f"{', '.join(map(str, sides))}{resize}."
        )


def _round_to(side: int, patch_size: int) -> int:
    return max(1, round(side / patch_size)) * patch_size


@dataclass(frozen=True)
class Draw:
    """Where the crops of B images lie, in pixels of the stored image, and which views are mirrored."""

    top: Int64[Tensor, " b"]
    left: Int64[Tensor, " b"]
    height: Int64[Tensor, " b"]
    width: Int64[Tensor, " b"]
    flip: Bool[Tensor, " b"]

    def to(self, device: str | torch.device) -> "Draw":
        """The same draw on another device, in one transfer."""
        packed = torch.stack([self.top, self.left, self.height, self.width, self.flip.long()]).to(device)
        return Draw(packed[0], packed[1], packed[2], packed[3], packed[4].bool())


def draw(seed: int, epoch: int, index: Int64[Tensor, " b"], sizes: Int64[Tensor, "b 2"], config: ViewConfig) -> Draw:
    """Draw a training crop and flip for each image: RandomResizedCrop, as a function of (seed, epoch, index).

    Ten boxes of random area and log-uniform aspect are proposed at once and the first that fits is taken; if none
    fits, the largest centred box within the aspect range. (Inception crops: Szegedy et al., 2015.)

    Parameters
    ----------
    seed, epoch
        What the crops are drawn from.
    index
        (B,) index of each image in its source.
    sizes
        (B, 2) height and width of each stored image.
    config
        Crop scale, crop ratio and flip.

    Returns
    -------
    Draw
        On the CPU whatever the device of `index`: square roots differ in the last bit between devices, and a crop
        must not.
    """
    index, sizes = index.cpu(), sizes.cpu()
    height, width = sizes[:, 0, None].double(), sizes[:, 1, None].double()
    tries = torch.arange(_CROP_TRIES)
    numbers = torch.stack(
        [uniform(seed, Stream.CROP, epoch, index[:, None], 4 * tries + part) for part in range(4)]
    ).double()
    low, high = config.crop_scale
    area = height * width * (low + numbers[0] * (high - low))
    narrow, wide = config.crop_ratio
    aspect = torch.exp(math.log(narrow) + numbers[1] * (math.log(wide) - math.log(narrow)))
    crop_width, crop_height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (crop_width >= 1) & (crop_height >= 1) & (crop_width <= width) & (crop_height <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    crop_height, crop_width = crop_height.gather(1, first), crop_width.gather(1, first)
    top = (numbers[2].gather(1, first) * (height - crop_height + 1)).floor()
    left = (numbers[3].gather(1, first) * (width - crop_width + 1)).floor()

    # The fallback: as much of the image as its aspect allows, in the middle.
    whole_width = torch.minimum(width, (height * wide).round().clamp(min=1))
    whole_height = torch.minimum(height, (width / narrow).round().clamp(min=1))
    found = fits.any(1, keepdim=True)
    box = [
        torch.where(found, top, ((height - whole_height) / 2).floor()),
        torch.where(found, left, ((width - whole_width) / 2).floor()),
        torch.where(found, crop_height, whole_height),
        torch.where(found, crop_width, whole_width),
    ]
    flip = uniform(seed, Stream.FLIP, epoch, index) < 0.5 if config.flip else torch.zeros_like(index, dtype=torch.bool)
    top, left, crop_height, crop_width = (side[:, 0].long() for side in box)
    return Draw(top, left, crop_height, crop_width, flip)


@lru_cache(maxsize=4096)
def repeats(height: int, width: int, config: ViewConfig) -> bool:
    """Whether `draw` gives an image of this size the same view in every epoch; where in doubt it says no.

    No flip and a crop scale of 1 are not enough. The proposed boxes have the area of the image but another aspect, and
    where one fits by rounding it may be another than the whole image: 6 × 7 pixels of 6 × 8. So all boxes that may be
    proposed are gone through. Square images always repeat.

    Parameters
    ----------
    height, width
        Of the stored image in pixels.
    config
        Crop scale, crop ratio and flip.
    """
    if config.flip or config.crop_scale != (1.0, 1.0):
        return False
    area, doubt = height * width, 1e-7  # of a rounded root
    narrowest, widest = (math.sqrt(area * ratio) for ratio in config.crop_ratio)
    whole_may_fit = False
    for crop_width in range(1, width + 1):
        low, high = max(narrowest, crop_width - 0.5) - doubt, min(widest, crop_width + 0.5) + doubt
        if low > high:
            continue
        lowest = max(1, math.ceil(area / high - 0.5 - doubt))  # height of the flattest box of this width
        if lowest <= height and (crop_width, lowest) != (width, height):
            return False
        whole_may_fit = whole_may_fit or lowest <= height
    fallback = (min(height, round(width / config.crop_ratio[0])), min(width, round(height * config.crop_ratio[1])))
    return not whole_may_fit or fallback == (height, width)


def centre_draw(sizes: Int64[Tensor, "b 2"], config: ViewConfig) -> Draw:
    """The eval view's box: the largest centred one of the view's aspect, not mirrored."""
    sizes = sizes.cpu()
    out_height, out_width = config.image_size
    height, width = sizes[:, 0].double(), sizes[:, 1].double()
    crop_height = torch.minimum(height, width * out_height / out_width).round().clamp(min=1)
    crop_width = torch.minimum(width, height * out_width / out_height).round().clamp(min=1)
    top, left = ((height - crop_height) / 2).floor(), ((width - crop_width) / 2).floor()
    flip = torch.zeros(len(sizes), dtype=torch.bool)
    return Draw(top.long(), left.long(), crop_height.long(), crop_width.long(), flip)


def to_float(images: Shaped[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
    """uint8 pixels as float32 in [0, 1]; floats are passed through."""
    return images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images


def train_view(image: Shaped[Tensor, "c H W"], box: Draw, config: ViewConfig) -> Float[Tensor, "c h w"]:
    """Cut one training view out of one image: torchvision's resized_crop, without the import of torchvision.

    Parameters
    ----------
    image
        (C, H, W) uint8, or float in [0, 1].
    box
        A `draw` for this one image.
    config
        Size of the view.

    Returns
    -------
    Tensor
        (C, h, w) float32 in [0, 1], resized bicubically with antialiasing.
    """
    view = _resized_crop(image, box, config)
    return view.flip(-1) if bool(box.flip) else view


def eval_view(image: Shaped[Tensor, "c H W"], config: ViewConfig) -> Float[Tensor, "c h w"]:
    """The fixed view of one image: centre crop to the view's aspect, resized; the image itself if it has that size."""
    sizes = torch.tensor([[image.shape[-2], image.shape[-1]]])
    return train_view(image, centre_draw(sizes, config), config)


def train_views(images: Shaped[Tensor, "b c H W"], boxes: Draw, config: ViewConfig) -> Float[Tensor, "b c h w"]:
    """Cut a training view out of each image of a batch, on the batch's device.

    Crop, antialiased bicubic resize and flip are linear in each axis, so each image takes two matrices:
    rows (h, H) times image (H, W) times columns (W, w).

    Parameters
    ----------
    images
        (B, C, H, W) uint8, or float in [0, 1].
    boxes
        A `draw` for these images.
    config
        Size of the view.

    Returns
    -------
    Tensor
        (B, C, h, w) float32 in [0, 1]; equal to `train_view` of each image to float precision.
    """
    batch, channels, height, width = images.shape
    out_height, out_width = config.image_size
    boxes = boxes.to(images.device)
    with torch.autocast(images.device.type, enabled=False):
        rows = _resize_weights(boxes.top, boxes.height, height, out_height, torch.zeros_like(boxes.flip))
        columns = _resize_weights(boxes.left, boxes.width, width, out_width, boxes.flip)
        pixels = to_float(images).float().reshape(batch, channels * height, width)
        pixels = torch.bmm(pixels, columns.transpose(1, 2)).reshape(batch, channels, height, out_width)
        pixels = pixels.transpose(1, 2).reshape(batch, height, channels * out_width)
        pixels = torch.bmm(rows, pixels).reshape(batch, out_height, channels, out_width).transpose(1, 2)
        return pixels.clamp(0, 1).contiguous()


def eval_views(images: Shaped[Tensor, "b c H W"], config: ViewConfig) -> Float[Tensor, "b c h w"]:
    """The fixed view of each image of a batch; the images themselves if they have the view's size."""
    if tuple(images.shape[-2:]) == config.image_size:
        return to_float(images)
    sizes = torch.tensor([[images.shape[-2], images.shape[-1]]])
    box = centre_draw(sizes, config)
    return _resized_crop(images, box, config)


def _resized_crop(images: Shaped[Tensor, "*b c H W"], box: Draw, config: ViewConfig) -> Float[Tensor, "*b c h w"]:
    """One box cut out of one image, or out of each image of a batch, and resized."""
    top, left, height, width = (int(side) for side in (box.top, box.left, box.height, box.width))
    pixels = to_float(images[..., top : top + height, left : left + width])
    if (height, width) == config.image_size:
        return pixels
    batch = pixels if pixels.ndim == 4 else pixels[None]
    resized = functional.interpolate(batch, size=config.image_size, mode="bicubic", antialias=True).clamp(0, 1)
    return resized if pixels.ndim == 4 else resized[0]


def _resize_weights(
    start: Int64[Tensor, " b"], length: Int64[Tensor, " b"], size: int, out: int, flip: Bool[Tensor, " b"]
) -> Float[Tensor, "b {out} {size}"]:
    """Weights of the `size` source pixels of one axis in each of `out` view pixels, for each image.

    Bicubic with a = -0.5, stretched by the scale when shrinking, as Pillow and torch's antialiased resize do.
    """
    device = start.device
    scale = length.float()[:, None] / out
    stretch = scale.clamp(min=1)
    target = torch.arange(out, device=device)[None, :]
    target = torch.where(flip[:, None], out - 1 - target, target)
    centre = scale * (target + 0.5)
    # Pixels beyond the crop's edge do not count; the rest is scaled up to sum to one.
    low = (centre - 2 * stretch + 0.5).long().clamp(min=0)
    high = torch.minimum((centre + 2 * stretch + 0.5).long(), length[:, None])
    source = torch.arange(size, device=device) - start[:, None]
    inside = (source[:, None] >= low[:, :, None]) & (source[:, None] < high[:, :, None])
    distance = ((source[:, None] + 0.5 - centre[:, :, None]) / stretch[:, :, None]).abs()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0)) * inside
    return weights / weights.sum(-1, keepdim=True)
