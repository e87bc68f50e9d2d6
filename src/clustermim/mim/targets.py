"""What is predicted of a hidden patch, and how a prediction is judged. One class and one registry line a target.

A target says how many numbers the model predicts for a patch (`output_dim`) and turns predictions into a loss; it sees
the same augmented view as the model, and works in 32 bits whatever precision the model runs in.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from clustermim.data.loaders import Loader
from clustermim.errors import InputError, nearest
from clustermim.features.patches import PatchFeatures, patchify
from clustermim.mim.cached_ids import CachedIds, cached_ids
from clustermim.mim.selecting import channel_table, normalise, split_mask, take_rows
from clustermim.tokenizers.tokenizer import Tokenizer


class TargetLoss(NamedTuple):
    """A scalar to minimise, and scalars worth logging (detached, on the device)."""

    loss: Float[Tensor, ""]
    figures: dict[str, Float[Tensor, ""]]


class Target(nn.Module, ABC):
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

    @abstractmethod
    def forward(
        self,
        predictions: Float[Tensor, "b hidden out"],
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"],
        *,
        index: Int64[Tensor, "b"] | None = None,
        labels: Int64[Tensor, "b"] | None = None,
        keys: Int64[Tensor, "b"] | None = None,
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
        keys
            `Batch.keys`, for targets that keep something.
        """

    def keep_what_repeats(self, loader: Loader, wanted: bool | None) -> str:
        """Compute once what depends on an image's view alone, where its view is the same in every epoch.

        Parameters
        ----------
        loader
            Of the training.
        wanted
            What the user said, or None.

        Returns
        -------
        str
            A sentence for the reader, empty where nothing is kept.
        """
        return ""


def widened(values: Tensor) -> Tensor:
    """Predictions in at least 32 bits, in which losses are computed."""
    return values if values.dtype == torch.float64 else values.float()


class TokenTarget(Target):
    """Cross-entropy on the tokens of the hidden patches (ClusterMIM: Du, Wang and Wang 2024; after BEiT).

    Parameters
    ----------
    tokenizer
        Gives each patch its token; it is not trained.
    label_smoothing
        Share of the probability that is spread over all tokens.
    soft
        Where above 0, the target is not one token but softmax(−distance / (soft · s)) over all of them, with s the mean
        distance of a centroid to its nearest other: patches between two centroids are called a bit of both.
    weights
        (K,) weight of each (hard) token in the loss; None weighs all alike.

    Raises
    ------
    InputError
        A number that cannot be meant, or soft targets of a tokenizer without centroids.
    """

    weights: Tensor | None

    def __init__(
        self,
        tokenizer: Tokenizer,
        label_smoothing: float = 0.0,
        soft: float = 0.0,
        weights: Float[Tensor, " k"] | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise InputError(f"--label-smoothing {label_smoothing} must be at least 0 and below 1.")
        if not 0.0 <= soft < math.inf:
            raise InputError(f"--soft-targets {soft} is a temperature: 0 for hard targets, or above.")
        if weights is not None and weights.shape != (tokenizer.vocab_size,):
            raise InputError(f"There are {len(weights)} token weights for a vocabulary of {tokenizer.vocab_size}.")
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.output_dim = int(tokenizer.vocab_size)
        self.requires = frozenset(tokenizer.requires)
        self.base_lr = 1e-3
        self.label_smoothing, self.temperature = label_smoothing, 0.0
        if soft:
            self.temperature = soft * _spacing(tokenizer)
        self.register_buffer("weights", weights, persistent=False)
        self.cache: CachedIds | None = None

    def keep_what_repeats(self, loader: Loader, wanted: bool | None) -> str:
        """The ids; with soft targets, which are distances, nothing."""
        if self.temperature:
            return ""
        self.cache, told = cached_ids(self.tokenizer, loader, wanted)
        return told

    def forward(
        self,
        predictions: Float[Tensor, "b hidden out"],
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"],
        *,
        index: Int64[Tensor, "b"] | None = None,
        labels: Int64[Tensor, "b"] | None = None,
        keys: Int64[Tensor, "b"] | None = None,
    ) -> TargetLoss:
        """See `Target.forward`; `accuracy` is the share of hidden patches whose token is predicted."""
        logits = widened(predictions).flatten(0, 1)
        with torch.no_grad():
            _, hidden = split_mask(mask, predictions.shape[1])
            goal: Tensor
            if self.temperature:
                goal = self._soft(images, hidden)
                wanted = goal.argmax(dim=1)
            else:
                goal = wanted = self._ids(images, index, labels, keys).gather(1, hidden).flatten()
        if self.weights is None:
            loss = F.cross_entropy(logits, goal, label_smoothing=self.label_smoothing)
        else:
            each = F.cross_entropy(logits, goal, label_smoothing=self.label_smoothing, reduction="none")
            loss = (each * self.weights[wanted]).mean()
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == wanted).float().mean()
        return TargetLoss(loss, {"accuracy": accuracy})

    def _ids(
        self, images: Tensor, index: Tensor | None, labels: Tensor | None, keys: Tensor | None
    ) -> Int64[Tensor, "b n"]:
        """The token of each patch, computed or kept."""
        if self.cache is None or keys is None:
            return self.tokenizer.encode(images, index=index, labels=labels)
        return self.cache.encode(images, keys, index=index, labels=labels)

    def _soft(self, images: Tensor, hidden: Tensor) -> Float[Tensor, "patches k"]:
        """The distribution over tokens for each hidden patch; its mode is the hard token."""
        codebook, features = self.tokenizer.codebook, self.tokenizer.features
        assert codebook is not None and features is not None  # _spacing has checked it
        self.tokenizer.check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            distances = codebook.distances(take_rows(features(images.float()), hidden).flatten(0, 1))
        return F.softmax(-distances / self.temperature, dim=1)


def _spacing(tokenizer: Tokenizer) -> float:
    """Mean distance, in the codebook's metric, of a centroid to its nearest other one."""
    if tokenizer.codebook is None or tokenizer.features is None:
        raise InputError(
            f"--soft-targets needs distances to centroids, and tokens of kind {tokenizer.kind!r} have none. "
            "Leave it out, or use K-means tokens."
        )
    codebook = tokenizer.codebook
    nearest_other = [
        codebook.distances(block).topk(2, dim=1, largest=False).values[:, 1]
        for block in torch.split(codebook.centroids, 1024)
    ]
    return max(float(torch.cat(nearest_other).double().mean()), 1e-12)


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
        self.register_buffer("mean", channel_table(mean), persistent=False)
        self.register_buffer("std", channel_table(std), persistent=False)

    def forward(
        self,
        predictions: Float[Tensor, "b hidden out"],
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"],
        *,
        index: Int64[Tensor, "b"] | None = None,
        labels: Int64[Tensor, "b"] | None = None,
        keys: Int64[Tensor, "b"] | None = None,
    ) -> TargetLoss:
        """See `Target.forward`."""
        with torch.no_grad():
            _, hidden = split_mask(mask, predictions.shape[1])
            pixels = take_rows(patchify(images.to(widened(predictions).dtype), self.patch_size), hidden)
            pixels = normalise(pixels, self.mean, self.std)
            if self.norm_pix:
                pixels = _standardised(pixels, 1e-6)
        return TargetLoss(F.mse_loss(widened(predictions), pixels), {})


def _standardised(patches: Float[Tensor, "b n d"], eps: float) -> Float[Tensor, "b n d"]:
    """Patches less their mean, over the square root of their variance (that of D - 1) and eps: one pass as a norm."""
    dim = patches.shape[-1]
    share = (dim - 1) / dim
    return F.layer_norm(patches, (dim,), patches.new_full((dim,), share**0.5), eps=eps * share)


class FeatureTarget(Target):
    """Mean squared error on a description of the hidden patches that is not trained.

    With `hog` this is MaskFeat (Wei et al. 2022, "Masked Feature Prediction"), with a backbone it is distillation.

    Parameters
    ----------
    features
        Images to (B, N, D).
    standardise
        Bring each patch's description to mean 0 and variance 1 over its D numbers first, so that no backbone's scale
        decides the loss. None does so for everything but `hog`, which is normalised by itself.

    Raises
    ------
    InputError
        Descriptions of one number cannot be standardised.
    """

    def __init__(self, features: PatchFeatures, standardise: bool | None = None) -> None:
        super().__init__()
        self.features = features.requires_grad_(False).eval()
        self.standardise = not features.spec.startswith("hog") if standardise is None else standardise
        self.output_dim = features.dim
        self.base_lr = 1.5e-4
        if self.standardise and features.dim < 2:
            raise InputError(
                f"Features `{features.spec}` are one number a patch, which has no variance: use --no-feature-norm."
            )

    def forward(
        self,
        predictions: Float[Tensor, "b hidden out"],
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"],
        *,
        index: Int64[Tensor, "b"] | None = None,
        labels: Int64[Tensor, "b"] | None = None,
        keys: Int64[Tensor, "b"] | None = None,
    ) -> TargetLoss:
        """See `Target.forward`."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            _, hidden = split_mask(mask, predictions.shape[1])
            wanted = take_rows(self.features(images.float()).to(widened(predictions).dtype), hidden)
            if self.standardise:
                wanted = F.layer_norm(wanted, wanted.shape[-1:], eps=1e-6)
        return TargetLoss(F.mse_loss(widened(predictions), wanted), {})


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What targets are made from; each takes what it knows.

    Attributes
    ----------
    patch_size, mean, std
        Of the patches and the images.
    tokenizer
        For `token`.
    label_smoothing, soft, token_weights
        For `token`.
    norm_pix
        For `pixel`.
    features, feature_norm
        For `feature`.
    """

    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenizer: Tokenizer | None = None
    label_smoothing: float = 0.0
    soft: float = 0.0
    token_weights: Float[Tensor, " k"] | None = None
    norm_pix: bool = True
    features: PatchFeatures | None = None
    feature_norm: bool | None = None


def _token(options: TargetOptions) -> Target:
    if options.tokenizer is None:
        raise InputError(
            "--target token needs --tokenizer DIR. Make one with `clustermim tokenizer fit`, or use --target pixel."
        )
    return TokenTarget(options.tokenizer, options.label_smoothing, options.soft, options.token_weights)


def _pixel(options: TargetOptions) -> Target:
    return PixelTarget(options.patch_size, options.mean, options.std, options.norm_pix)


def _feature(options: TargetOptions) -> Target:
    if options.features is None:
        raise InputError(
            "--target feature needs --features SPEC: `hog` (MaskFeat), or `backbone:<timm name>@<file>` to distil it."
        )
    return FeatureTarget(options.features, options.feature_norm)


TARGETS: dict[str, Callable[[TargetOptions], Target]] = {"token": _token, "pixel": _pixel, "feature": _feature}
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
