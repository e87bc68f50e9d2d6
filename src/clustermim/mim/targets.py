"""What is predicted of a hidden patch, and how a prediction is judged. One class and one registry line a target.

A target says how many numbers the model predicts for a patch (`output_dim`) and turns predictions into a loss; it sees
the same augmented view as the model, and works in 32 bits whatever precision the model runs in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from clustermim.errors import InputError, nearest
from clustermim.features.patches import patchify
from clustermim.mim.model import normalise, split_mask, take_rows
from clustermim.tokenizers.tokenizer import Tokenizer


class TargetLoss(NamedTuple):
    """A scalar to minimise, and scalars worth logging (detached, on the device)."""

    loss: Float[Tensor, ""]
    figures: dict[str, Float[Tensor, ""]]


class Target(nn.Module):
    """Base of all targets.

    Attributes
    ----------
    output_dim
        Numbers the model predicts for a patch.
    base_lr
        Learning rate for 256 images a step that suits this target.
    requires
        What `forward` needs beside the images: of `index`, `labels`.
    """

    output_dim: int
    base_lr: float
    requires: frozenset[str] = frozenset()

    def forward(
        self,
        predictions: Float[Tensor, "b hidden out"],
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"],
        *,
        index: Int64[Tensor, "b"] | None = None,
        labels: Int64[Tensor, "b"] | None = None,
    ) -> TargetLoss:
        """The mean loss over the hidden patches of all images.

        Parameters
        ----------
        predictions
            For the hidden patches in row-major order.
        images
            The view that the model saw, in [0,1].
        mask
            True where a patch is hidden.
        index, labels
            Of the images, for targets that require them.
        """
        raise NotImplementedError


class TokenTarget(Target):
    """Cross-entropy on the tokens of the hidden patches (ClusterMIM: Du, Wang and Wang 2024; after BEiT).

    Parameters
    ----------
    tokenizer
        Gives each patch its token; it is not trained.
    label_smoothing
        Share of the probability that is spread over all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise InputError(f"--label-smoothing {label_smoothing} must be at least 0 and below 1.")
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.output_dim = int(tokenizer.vocab_size)
        self.requires = frozenset(tokenizer.requires)
        self.base_lr = 1e-3
        self.label_smoothing = label_smoothing

    def forward(
        self,
        predictions: Float[Tensor, "b hidden out"],
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"],
        *,
        index: Int64[Tensor, "b"] | None = None,
        labels: Int64[Tensor, "b"] | None = None,
    ) -> TargetLoss:
        """See `Target.forward`; `accuracy` is the share of hidden patches whose token is predicted."""
        with torch.no_grad():
            ids = self.tokenizer.encode(images, index=index, labels=labels)
            _, hidden = split_mask(mask, predictions.shape[1])
            wanted = ids.gather(1, hidden).flatten()
        logits = predictions.float().flatten(0, 1)
        loss = F.cross_entropy(logits, wanted, label_smoothing=self.label_smoothing)
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == wanted).float().mean()
        return TargetLoss(loss, {"accuracy": accuracy})


class PixelTarget(Target):
    """Mean squared error on the pixels of the hidden patches, normalised per channel as the model sees them (MAE).

    Parameters
    ----------
    patch_size
        Patch side in pixels.
    mean, std
        Per channel.
    norm_pix
        Bring every target patch to mean 0 and variance 1 first: local contrast instead of brightness (He et al. 2021).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, patch_size: int, mean: Sequence[float], std: Sequence[float], norm_pix: bool = True) -> None:
        super().__init__()
        self.patch_size, self.norm_pix = patch_size, norm_pix
        self.output_dim = patch_size * patch_size * len(mean)
        self.base_lr = 1.5e-4
        if norm_pix and self.output_dim < 2:
            raise InputError(
                "--norm-pix needs patches of two values or more: one pixel of one channel has no variance. "
                "Use --no-norm-pix or a larger --patch-size."
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(
        self,
        predictions: Float[Tensor, "b hidden out"],
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"],
        *,
        index: Int64[Tensor, "b"] | None = None,
        labels: Int64[Tensor, "b"] | None = None,
    ) -> TargetLoss:
        """See `Target.forward`."""
        with torch.no_grad():
            _, hidden = split_mask(mask, predictions.shape[1])
            pixels = take_rows(patchify(images.float(), self.patch_size), hidden)
            pixels = normalise(pixels, self.mean, self.std)
            if self.norm_pix:
                variance, centre = torch.var_mean(pixels, dim=-1, keepdim=True)
                pixels = (pixels - centre) / (variance + 1e-6).sqrt()
        return TargetLoss(F.mse_loss(predictions.float(), pixels), {})


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What targets are made from; each takes what it knows.

    Attributes
    ----------
    patch_size, mean, std
        Of the patches and the images.
    tokenizer
        For `token`.
    label_smoothing
        For `token`.
    norm_pix
        For `pixel`.
    """

    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenizer: Tokenizer | None = None
    label_smoothing: float = 0.0
    norm_pix: bool = True


def _token(options: TargetOptions) -> Target:
    if options.tokenizer is None:
        raise InputError(
            "--target token needs --tokenizer DIR. Make one with `clustermim tokenizer fit`, or use --target pixel."
        )
    return TokenTarget(options.tokenizer, options.label_smoothing)


def _pixel(options: TargetOptions) -> Target:
    return PixelTarget(options.patch_size, options.mean, options.std, options.norm_pix)


TARGETS: dict[str, Callable[[TargetOptions], Target]] = {"token": _token, "pixel": _pixel}
"""What can be predicted; a new target is a class, a maker and a line here."""


def make_target(name: str, options: TargetOptions) -> Target:
    """The target called `name`.

    Raises
    ------
    InputError
        There is none of that name (the nearest is named), or an option does not suit it.
    """
    if name not in TARGETS:
        raise InputError(f"There is no target {name!r}.{nearest(name, TARGETS)}")
    return TARGETS[name](options)
