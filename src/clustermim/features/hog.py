"""Histograms of oriented gradients (Dalal and Triggs, CVPR 2005), a whole batch at once."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from clustermim.data.views import ViewConfig
from clustermim.errors import InputError
from clustermim.features.patches import NamedFeatures
from clustermim.features.spelling import SpecPart
from clustermim.features.windows import check_margin, check_window

NORMS = ("l2-hys", "l2", "l1-sqrt", "l1", "none")
_EPSILON = 1e-5  # beside the length of a block, as in scikit-image
_CLIP = 0.2  # of l2-hys, as in Dalal and Triggs


class HOGFeatures(NamedFeatures):
    """`hog[?orientations=9&cell=8&context=32&block=2&norm=l2-hys]`: which way edges run in and around a patch.

    The gradient of a pixel is that of the channel where it is largest, by central differences, 0 across the image's
    edge. Its length is added to the bin of its direction (without sign) in the pixel's cell. The window around a patch
    is cut into cells, and each block of neighbouring cells is brought to unit length; blocks overlap where a window
    holds several. D = (blocks down · blocks across) · block² · orientations, in this order, in a block cells
    row-major, in a cell orientations. Equal to scikit-image's `hog` on the same cells and blocks.

    Parameters
    ----------
    spec
        As the user wrote it.
    patch_size
        Patch side P in pixels.
    channels
        Channels of the images. Gradients are those of the view in [0, 1], so mean and std play no part.
    orientations
        Bins over 180 degrees.
    cell
        Side in pixels of a cell; None takes half a patch where P is even and at least 8, else the whole.
    context
        Side in pixels of the window around the patch's centre; None takes the patch itself. At the image's edge the
        window is filled by reflection.
    block
        Side in cells of a block; None takes the whole window as one.
    norm
        How a block is brought to unit length: ``l2``, ``l2-hys`` (l2, then clipped at 0.2, then l2 again), ``l1``,
        ``l1-sqrt`` (the root of l1), ``none``.

    Raises
    ------
    InputError
        The window cannot be centred on the patch or cut into cells, or the block is larger than the window.
    """

    def __init__(
        self,
        spec: str = "hog",
        *,
        patch_size: int,
        channels: int,
        orientations: int = 9,
        cell: int | None = None,
        context: int | None = None,
        block: int | None = None,
        norm: str = "l2-hys",
    ) -> None:
        window = patch_size if context is None else context
        check_window(spec, window, patch_size)
        cell = (patch_size // 2 if patch_size >= 8 and patch_size % 2 == 0 else patch_size) if cell is None else cell
        if orientations < 1:
            raise InputError(f"Features `{spec}`: orientations must be at least 1, not {orientations}.")
        if cell < 1 or window % cell:
            sides = [side for side in range(1, window + 1) if window % side == 0]
            raise InputError(
                f"Features `{spec}`: a window of {window} pixels cannot be cut into cells of side {cell}. "
                f"Choose cell = {', '.join(map(str, sides))}."
            )
        across = window // cell
        block = across if block is None else block
        if not 1 <= block <= across:
            raise InputError(
                f"Features `{spec}`: a window of {window} pixels has {across} × {across} cells of side {cell}; a block "
                f"of {block} × {block} of them is not to be had. Choose block from 1 to {across}."
            )
        if norm not in NORMS:
            raise InputError(f"Features `{spec}`: norm is one of {', '.join(NORMS)}, not {norm!r}.")
        dim = (across - block + 1) ** 2 * block * block * orientations
        super().__init__(spec, patch_size=patch_size, channels=channels, dim=dim)
        self.orientations, self.cell, self.window, self.block, self.norm = orientations, cell, window, block, norm

    @classmethod
    def from_spec(cls, part: SpecPart, *, patch_size: int, view: ViewConfig) -> "HOGFeatures":
        """Build for a view's channels."""
        part.check_options(["orientations", "cell", "context", "block", "norm"])
        part.check_bare()
        orientations = part.integer("orientations")
        made = cls(
            part.text,
            patch_size=patch_size,
            channels=view.channels,
            orientations=9 if orientations is None else orientations,
            cell=part.integer("cell"),
            context=part.integer("context"),
            block=part.integer("block"),
            norm=part.choice("norm", NORMS),
        )
        check_margin(part.text, made.window, patch_size, *view.image_size)
        return made

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "HOGFeatures":
        """The inverse of `config`."""
        keys = ("patch_size", "channels", "orientations", "cell", "context", "block", "norm")
        return cls(config["spec"], **{key: config[key] for key in keys})

    def config(self) -> dict[str, Any]:
        """Everything `__init__` takes."""
        return {
            "name": "hog",
            "spec": self.spec,
            "patch_size": self.patch_size,
            "channels": self.channels,
            "orientations": self.orientations,
            "cell": self.cell,
            "context": self.window,
            "block": self.block,
            "norm": self.norm,
        }

    @property
    def batch_invariant(self) -> bool:
        """Sums go over the pixels of one cell or block only."""
        return True

    def describe(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Gradients, cells, then the blocks of each window."""
        rows, columns = self.grid(images.shape[2], images.shape[3])
        check_margin(self.spec, self.window, self.patch_size, images.shape[2], images.shape[3])
        margin = (self.window - self.patch_size) // 2
        padded = functional.pad(images.float(), (margin,) * 4, mode="reflect") if margin else images.float()
        length, direction = strongest_gradient(padded)
        cells = self._cells(length, orientation_bin(direction, self.orientations))
        # Cells lie on a lattice of `step` pixels that holds the cells of every window.
        step = math.gcd(self.patch_size, self.cell)
        within = torch.arange(self.window // self.cell, device=images.device) * (self.cell // step)
        down = torch.arange(rows, device=images.device)[:, None] * (self.patch_size // step) + within
        across = torch.arange(columns, device=images.device)[:, None] * (self.patch_size // step) + within
        windows = cells[:, :, down[:, :, None, None], across]  # (b, orientations, rows, cells, columns, cells)
        blocks = windows.permute(0, 2, 4, 3, 5, 1).unfold(3, self.block, 1).unfold(4, self.block, 1)
        blocks = blocks.movedim(5, -1)  # (b, rows, columns, blocks, blocks, block, block, orientations)
        return normalise_blocks(blocks.flatten(5), self.norm).flatten(3).flatten(1, 2)

    def _cells(
        self, length: Float[Tensor, "b h w"], bins: Int64[Tensor, "b h w"]
    ) -> Float[Tensor, "b orientations rows columns"]:
        """Mean over a cell's pixels of the gradient lengths in each bin, at every place of the lattice."""
        step = math.gcd(self.patch_size, self.cell)
        spread = length.new_zeros(length.shape[0], self.orientations, *length.shape[1:])
        spread.scatter_(1, bins[:, None], length[:, None])
        return functional.avg_pool2d(spread, self.cell, stride=step)


def strongest_gradient(
    images: Float[Tensor, "b c h w"],
) -> tuple[Float[Tensor, "b h w"], tuple[Float[Tensor, "b h w"], Float[Tensor, "b h w"]]]:
    """Length and (down, across) of each pixel's gradient, in the channel where it is longest (the first of equals).

    Central differences without the factor ½; 0 across the edge of the image.
    """
    down, across = torch.zeros_like(images), torch.zeros_like(images)
    down[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
    across[:, :, :, 1:-1] = images[:, :, :, 2:] - images[:, :, :, :-2]
    square = down.square() + across.square()
    if images.shape[1] == 1:
        return square[:, 0].sqrt(), (down[:, 0], across[:, 0])
    longest, channel = square.max(1, keepdim=True)
    return longest[:, 0].sqrt(), (down.gather(1, channel)[:, 0], across.gather(1, channel)[:, 0])


def orientation_bin(
    direction: tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]], orientations: int
) -> Int64[Tensor, "*n"]:
    """Which of the bins over [0°, 180°) the line along (down, across) falls in."""
    down, across = direction
    turn = (down < 0) | ((down == 0) & (across < 0))  # a line has no sign
    angle = torch.atan2(torch.where(turn, -down, down), torch.where(turn, -across, across))
    return (angle * (orientations / math.pi)).long().clamp_(0, orientations - 1)


def normalise_blocks(blocks: Float[Tensor, "*n d"], norm: str) -> Float[Tensor, "*n d"]:
    """Blocks of unit length, by the norms of Dalal and Triggs, section 6.4; an empty block stays 0."""
    if norm == "none":
        return blocks
    if norm in ("l1", "l1-sqrt"):
        scaled = blocks / (blocks.abs().sum(-1, keepdim=True) + _EPSILON)
        return scaled.sqrt() if norm == "l1-sqrt" else scaled
    scaled = _unit(blocks)
    return _unit(scaled.clamp_max(_CLIP)) if norm == "l2-hys" else scaled


def _unit(blocks: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    return blocks * torch.rsqrt(blocks.square().sum(-1, keepdim=True) + _EPSILON**2)
