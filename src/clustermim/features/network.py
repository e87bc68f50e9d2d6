"""Features of a frozen timm network: one of its maps, brought to the patch grid."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from clustermim.data.pixels import adapt_channels
from clustermim.errors import InputError
from clustermim.features.patches import NamedFeatures
from clustermim.features.spelling import SpecPart

DTYPES = ("float32", "bf16")


class NetworkFeatures(NamedFeatures):
    """One feature map of a timm network; subclasses say where network and weights come from.

    The image is resized to what the network takes, the network's own mean and std are applied, and the map of one
    layer is brought to the patch grid: averaged where it is finer, interpolated where it is coarser. The weights are
    part of the state dict, up to the layer that is used, in 32 bits.

    Parameters
    ----------
    spec
        As the user wrote it.
    model
        A timm model that has `forward_intermediates`; it is cut off behind `layer`.
    model_name
        Its timm name.
    patch_size
        Patch side P of the images, whatever the network's own patches are.
    channels
        Channels of the images.
    size
        Height and width in pixels at which the network sees an image.
    layer
        Which map, from 0, as timm's `indices` count them: blocks of a ViT, stages of a CNN. The final norm is applied
        to the last only.
    mean, std
        Of each of the network's channels.
    dtype
        ``bf16`` computes products in 16 bits (autocast): faster where the hardware has them, a hundred times slower
        on a CPU that has not (no AVX-512), features alike to about three digits. They come out in 32 bits either way.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        spec: str,
        *,
        model: nn.Module,
        model_name: str,
        patch_size: int,
        channels: int,
        size: tuple[int, int],
        layer: int,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: str = "float32",
    ) -> None:
        net: Any = model
        info = net.feature_info
        super().__init__(spec, patch_size=patch_size, channels=channels, dim=int(info[layer]["num_chs"]))
        self.model_name = model_name
        self.size = size
        self.layer = layer
        self.dtype = dtype
        self._last = layer == len(info) - 1
        net.prune_intermediate_layers([layer], prune_norm=not self._last, prune_head=True)
        self.model: Any = net
        # Known from the config, so not part of the state dict.
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32), persistent=False)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Everything but the weights."""
        return {
            "spec": self.spec,
            "model_name": self.model_name,
            "patch_size": self.patch_size,
            "channels": self.channels,
            "size": list(self.size),
            "layer": self.layer,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "dtype": self.dtype,
        }

    def describe(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Resize, run the network up to the layer, bring its map to the patch grid."""
        grid = self.grid(images.shape[2], images.shape[3])
        if not len(images):  # timm cannot reshape nothing
            return images.new_empty(0, grid[0] * grid[1], self.dim)
        x = adapt_channels(images, len(self.mean))
        if x.shape[2:] != self.size:
            x = functional.interpolate(x, self.size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        x = (x - self.mean[:, None, None]) / self.std[:, None, None]
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bf16"):
            (found,) = self.model.forward_intermediates(
                x, indices=[self.layer], norm=self._last, stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
        return to_grid(found.float(), grid).flatten(2).transpose(1, 2)


def to_grid(found: Float[Tensor, "b d h w"], grid: tuple[int, int]) -> Float[Tensor, "b d rows columns"]:
    """A feature map on the patch grid: averaged where it is finer, interpolated where it is coarser."""
    if found.shape[2:] == grid:
        return found
    if found.shape[2] >= grid[0] and found.shape[3] >= grid[1]:
        return functional.adaptive_avg_pool2d(found, grid)
    return functional.interpolate(found, grid, mode="bilinear", antialias=True)


def chosen_layer(part: SpecPart, depth: int, what: str) -> int:
    """The layer that a spec asks for, from 0; the last where it asks for none.

    Raises
    ------
    InputError
        The network has no such layer.
    """
    layer = part.integer("layer")
    layer = depth - 1 if layer is None else layer
    if not -depth <= layer < depth:
        raise InputError(f"Features `{part.text}`: {what} has layers 0 to {depth - 1}; there is no layer {layer}.")
    return layer % depth
