"""Pixels as features: normalised, and if wished standardised patch by patch, or with the pixels around the patch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from clustermim.data.views import ViewConfig
from clustermim.errors import InputError
from clustermim.features.patches import PatchFeatures, SpecPart, patchify

_EPSILON = 1e-6  # added to a patch's variance, as in MAE's norm-pix


class PixelFeatures(PatchFeatures):
    """`pixel[?standardise=true&context=12]`: D = window² · C, in a window rows, then columns, then channels.

    Parameters
    ----------
    spec
        As the user wrote it.
    patch_size
        Patch side P in pixels.
    mean, std
        Statistics of each channel, by which pixels are normalised.
    standardise
        Bring each patch to zero mean and unit variance over all its values (He et al., MAE, 2022: norm-pix). Its
        brightness and contrast are then no part of its token.
    context
        Side in pixels of the window around the patch's centre that describes it; None takes the patch itself. At the
        image's edge the window is filled by reflection.

    Raises
    ------
    InputError
        The window is smaller than the patch, or cannot be centred on it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        spec: str = "pixel",
        *,
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        standardise: bool = False,
        context: int | None = None,
    ) -> None:
        window = patch_size if context is None else context
        if window < patch_size or (window - patch_size) % 2:
            raise InputError(
                f"Features `{spec}`: a window of {window} pixels cannot be centred on patches of side {patch_size}. "
                f"Choose context = {patch_size + 2}, {patch_size + 4}, {patch_size + 6} or further in steps of 2."
            )
        super().__init__(spec, patch_size=patch_size, channels=len(mean), dim=window * window * len(mean))
        self.standardise = standardise
        self.window = window
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32))

    @classmethod
    def from_spec(cls, part: SpecPart, *, patch_size: int, view: ViewConfig) -> "PixelFeatures":
        """Build for a view, whose mean and std become those of the features."""
        part.check_options(["standardise", "context"])
        if part.argument is not None or part.file is not None:
            raise InputError(f"Features `{part.text}`: pixel takes no name and no file; write pixel?key=value.")
        made = cls(
            part.text,
            patch_size=patch_size,
            mean=view.mean,
            std=view.std,
            standardise=part.flag("standardise"),
            context=part.integer("context"),
        )
        made._check_margin(*view.image_size)
        return made

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PixelFeatures":
        """The inverse of `config`."""
        keys = ("patch_size", "mean", "std", "standardise", "context")
        return cls(config["spec"], **{key: config[key] for key in keys})

    def config(self) -> dict[str, Any]:
        """Everything `__init__` takes."""
        return {
            "name": "pixel",
            "spec": self.spec,
            "patch_size": self.patch_size,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "standardise": self.standardise,
            "context": self.window,
        }

    def describe(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Cut first, then normalise all patches in one step, so that pixels are read and written once each."""
        windows = self._windows(images.to(self.mean.dtype))
        scale = (1.0 / self.std).repeat(self.window * self.window)
        offset = (-self.mean / self.std).repeat(self.window * self.window)
        values = torch.addcmul(offset, windows, scale)
        if not self.standardise:
            return values
        values = values - values.mean(dim=2, keepdim=True)
        return values * torch.rsqrt(values.square().mean(dim=2, keepdim=True) + _EPSILON)

    def _windows(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        margin = (self.window - self.patch_size) // 2
        if margin == 0:
            return patchify(images, self.patch_size)
        self._check_margin(images.shape[2], images.shape[3])
        padded = functional.pad(images, (margin,) * 4, mode="reflect")
        cut = padded.unfold(2, self.window, self.patch_size).unfold(3, self.window, self.patch_size)
        return cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # (b, rows, columns, window, window, c)

    def _check_margin(self, height: int, width: int) -> None:
        margin = (self.window - self.patch_size) // 2
        if margin >= min(height, width):
            most = self.patch_size + 2 * (min(height, width) - 1)
            raise InputError(
                f"Features `{self.spec}`: a window of {self.window} pixels reaches {margin} pixels beyond images of "
                f"{height} × {width}, more than reflection can fill. Choose a context of at most {most}."
            )
