"""What a masked image model predicts of the hidden patches of a few images: tokens, pixels, or patch features."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from clustermim.features.patches import PatchFeatures, patchify
from clustermim.mim.contract import MaskedModel
from clustermim.mim.selecting import split_mask, take_rows
from clustermim.render.sheets import to_rgb
from clustermim.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One image with hidden patches, and what the model makes of them. Of tokens, pixels and features one is there."""

    picture: UInt8[np.ndarray, "h w 3"] = field(repr=False)
    mask: Bool[np.ndarray, "rows columns"] = field(repr=False)
    """True where hidden."""
    true: Int64[np.ndarray, "rows columns"] | None = field(default=None, repr=False)
    """Token of each patch."""
    predicted: Int64[np.ndarray, "rows columns"] | None = field(default=None, repr=False)
    """The likeliest token of each hidden patch; of the visible ones the true token."""
    rebuilt: UInt8[np.ndarray, "h w 3"] | None = field(default=None, repr=False)
    """The image with its hidden patches as predicted."""
    described: Float[np.ndarray, "n d"] | None = field(default=None, repr=False)
    """Features of each patch, in row-major order."""
    foretold: Float[np.ndarray, "n d"] | None = field(default=None, repr=False)
    """The predicted features of each hidden patch; of the visible ones the true ones."""
    figure: float
    """Share of the hidden tokens that are predicted right, or mean squared error of the hidden pixels in [0, 1], or of
    the hidden features."""


@torch.no_grad()
def predict_tokens(
    model: MaskedModel, tokenizer: Tokenizer, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"]
) -> list[Prediction]:
    """The likeliest token of each hidden patch, beside the true ones.

    Parameters
    ----------
    model, tokenizer
        On the device of the images; the tokenizer needs no index and no labels.
    images
        Views in [0, 1].
    mask
        True where hidden; as many in every row.
    """
    predictions, hidden = model(images, mask).float(), split_mask(mask)[1]
    true = tokenizer.encode(images)
    predicted = true.scatter(1, hidden, predictions.argmax(dim=2))
    right = (true == predicted).gather(1, hidden).float().mean(dim=1)
    return [
        Prediction(
            picture=to_rgb(images[i].cpu().numpy()),
            mask=mask[i].reshape(model.grid).cpu().numpy(),
            true=true[i].reshape(model.grid).cpu().numpy(),
            predicted=predicted[i].reshape(model.grid).cpu().numpy(),
            figure=float(right[i]),
        )
        for i in range(len(images))
    ]


@torch.no_grad()
def predict_pixels(
    model: MaskedModel,
    images: Float[Tensor, "b c h w"],
    mask: Bool[Tensor, "b n"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> list[Prediction]:
    """Each image with its hidden patches as predicted.

    Parameters
    ----------
    model, images, mask
        As for `predict_tokens`.
    mean, std
        Per channel, that the target takes off pixels.
    norm_pix
        Predictions are patches of mean 0 and variance 1; they are given the true mean and spread of their patch.
    """
    predictions, hidden = model(images, mask).float(), split_mask(mask)[1]
    patches = patchify(images, model.patch_size)
    centre_of, spread_of = (torch.tensor(values, device=images.device) for values in (mean, std))
    channels = model.channels
    truth = take_rows(patches, hidden)
    if norm_pix:
        scaled = ((truth.reshape(*truth.shape[:2], -1, channels) - centre_of) / spread_of).flatten(2)
        variance, centre = torch.var_mean(scaled, dim=-1, keepdim=True)
        predictions = predictions * (variance + 1e-6).sqrt() + centre
    pixels = (predictions.reshape(*truth.shape[:2], -1, channels) * spread_of + centre_of).flatten(2)
    errors = (pixels - truth).square().mean(dim=(1, 2))
    whole = patches.scatter(1, hidden[..., None].expand(-1, -1, patches.shape[2]), pixels.clamp(0, 1))
    rebuilt = unpatchify(whole, model.grid, model.patch_size)
    return [
        Prediction(
            picture=to_rgb(images[i].cpu().numpy()),
            mask=mask[i].reshape(model.grid).cpu().numpy(),
            rebuilt=to_rgb(rebuilt[i].cpu().numpy()),
            figure=float(errors[i]),
        )
        for i in range(len(images))
    ]


@torch.no_grad()
def predict_features(
    model: MaskedModel,
    features: PatchFeatures,
    images: Float[Tensor, "b c h w"],
    mask: Bool[Tensor, "b n"],
    *,
    standardise: bool,
) -> list[Prediction]:
    """The predicted features of each hidden patch, beside the true ones.

    Parameters
    ----------
    model, images, mask
        As for `predict_tokens`.
    features
        On the device of the images.
    standardise
        Whether the target brings each patch's features to mean 0 and variance 1.
    """
    predictions, hidden = model(images, mask).float(), split_mask(mask)[1]
    true = features(images).float()
    if standardise:
        true = F.layer_norm(true, true.shape[-1:], eps=1e-6)
    errors = (predictions - take_rows(true, hidden)).square().mean(dim=(1, 2))
    foretold = true.scatter(1, hidden[..., None].expand(-1, -1, true.shape[2]), predictions)
    return [
        Prediction(
            picture=to_rgb(images[i].cpu().numpy()),
            mask=mask[i].reshape(model.grid).cpu().numpy(),
            described=true[i].cpu().numpy(),
            foretold=foretold[i].cpu().numpy(),
            figure=float(errors[i]),
        )
        for i in range(len(images))
    ]


def unpatchify(patches: Float[Tensor, "b n d"], grid: tuple[int, int], side: int) -> Float[Tensor, "b c h w"]:
    """The inverse of `patchify`: patches in row-major order, channels last within a patch, as images."""
    rows, columns = grid
    cut = patches.reshape(len(patches), rows, columns, side, side, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * side, columns * side)
