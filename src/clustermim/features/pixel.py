"""Pixels as features: normalised, and if wished standardised patch by patch, whitened, or with the pixels around."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clustermim.data.views import ViewConfig
from clustermim.errors import InputError
from clustermim.features.moments import ImagePasses, Moments, no_variance
from clustermim.features.patches import NamedFeatures
from clustermim.features.projection import EPSILON, Projection, zca
from clustermim.features.spelling import SpecPart
from clustermim.features.windows import check_margin, check_window, windows

_EPSILON = 1e-6  # added to a patch's variance, as in MAE's norm-pix


class PixelFeatures(NamedFeatures):
    """`pixel[?standardise=true&context=12&whiten=true&epsilon=0.1]`: D = window² · C, in rows, columns, then channels.

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
    whiten
        Take away the correlation of neighbouring pixels, so that edges count as much as brightness does: ZCA whitening
        (Coates and Ng, "Learning feature representations with k-means", 2012), fitted on the training patches.
    epsilon
        Damps the whitening of directions in which patches hardly differ: share of the mean eigenvalue of the covariance
        that is added to every eigenvalue. Larger keeps more of the pixels, smaller amplifies more noise.
    fitted
        Whether the state that will be loaded is that of a fitted whitening.

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
        whiten: bool = False,
        epsilon: float = EPSILON,
        fitted: bool = False,
    ) -> None:
        window = patch_size if context is None else context
        check_window(spec, window, patch_size)
        super().__init__(spec, patch_size=patch_size, channels=len(mean), dim=window * window * len(mean))
        self.standardise = standardise
        self.window = window
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32))
        self.whitening = Projection(self.dim, self.dim) if whiten else None
        self.epsilon = epsilon
        self.fitted = fitted

    @classmethod
    def from_spec(cls, part: SpecPart, *, patch_size: int, view: ViewConfig) -> "PixelFeatures":
        """Build for a view, whose mean and std become those of the features."""
        part.check_options(["standardise", "context", "whiten", "epsilon"])
        part.check_bare()
        if "epsilon" in part.options and not part.flag("whiten"):
            raise InputError(f"Features `{part.text}`: epsilon damps whitening; add whiten=true, or leave it out.")
        made = cls(
            part.text,
            patch_size=patch_size,
            mean=view.mean,
            std=view.std,
            standardise=part.flag("standardise"),
            context=part.integer("context"),
            whiten=part.flag("whiten"),
            epsilon=part.number("epsilon", EPSILON),
        )
        check_margin(part.text, made.window, patch_size, *view.image_size)
        return made

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PixelFeatures":
        """The inverse of `config`."""
        keys = ("patch_size", "mean", "std", "standardise", "context")
        whitening = {key: config[key] for key in ("whiten", "epsilon", "fitted") if key in config}
        return cls(config["spec"], **{key: config[key] for key in keys}, **whitening)

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
            **({} if self.whitening is None else {"whiten": True, "epsilon": self.epsilon, "fitted": self.fitted}),
        }

    @property
    def batch_invariant(self) -> bool:
        """Unless whitened."""
        return self.whitening is None

    @property
    def needs_fit(self) -> bool:
        """Where whitening is asked for and not yet fitted."""
        return self.whitening is not None and not self.fitted

    def fit(self, images: ImagePasses) -> dict[str, Any]:
        """Fit the whitening in one pass."""
        if self.whitening is None:
            return {}
        moments = Moments(self.dim)
        with torch.no_grad():
            for batch in images():
                moments.add(self._plain(batch).flatten(0, 1))
        moments.finish(self.spec)
        if bool(moments.constant.all()):
            raise no_variance(self.spec, moments.rows)
        self.whitening.set(*zca(moments, self.epsilon))
        self.fitted = True
        return {}

    def to_pixels(self, rows: Float[Tensor, "k d"]) -> Float[Tensor, "k c window window"]:
        """What these features look like, in [0, 1] where patches do: whitening and normalisation taken back.

        Of standardised patches brightness and contrast are gone, so they are shown around the mean.
        """
        values = rows if self.whitening is None else self.whitening.undo(rows)
        pixels = values.reshape(len(rows), self.window, self.window, self.channels) * self.std + self.mean
        return pixels.permute(0, 3, 1, 2)

    def describe(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Normalised, standardised, whitened, as asked."""
        plain = self._plain(images)
        if self.whitening is None:
            return plain
        whitened: Tensor = self.whitening(plain)
        return whitened

    def _plain(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Cut first, then normalise all patches in one step, so that pixels are read and written once each."""
        cut = windows(images.to(self.mean.dtype), self.patch_size, self.window, self.spec)
        scale = (1.0 / self.std).repeat(self.window * self.window)
        offset = (-self.mean / self.std).repeat(self.window * self.window)
        values = torch.addcmul(offset, cut, scale)
        if not self.standardise:
            return values
        values = values - values.mean(dim=2, keepdim=True)
        return values * torch.rsqrt(values.square().mean(dim=2, keepdim=True) + _EPSILON)
