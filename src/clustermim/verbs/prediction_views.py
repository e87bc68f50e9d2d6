"""What a masked image model predicts of hidden patches: its tokens beside the true ones, or a reconstruction."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from clustermim.data.masks import block_masks, random_masks
from clustermim.data.sources import ImageSource
from clustermim.data.views import eval_view
from clustermim.encoders.contract import Encoder
from clustermim.encoders.weights import read_weights
from clustermim.errors import InputError
from clustermim.evaluation.evaluating import view_for
from clustermim.features.patches import patchify
from clustermim.mim.building import build_model
from clustermim.mim.contract import MaskedModel
from clustermim.mim.model import MaskedImageModel
from clustermim.mim.selecting import split_mask, take_rows
from clustermim.mim.starting import MODEL_FILE
from clustermim.render.sheets import to_rgb
from clustermim.runs import read_manifest
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One image with hidden patches, and what the model makes of them."""

    picture: UInt8[np.ndarray, "h w 3"] = field(repr=False)
    mask: Bool[np.ndarray, "rows columns"] = field(repr=False)
    """True where hidden."""
    true: Int64[np.ndarray, "rows columns"] | None = field(repr=False)
    """Token of each patch; None for a model that predicts pixels."""
    predicted: Int64[np.ndarray, "rows columns"] | None = field(repr=False)
    """The likeliest token of each hidden patch; of the visible ones the true token."""
    rebuilt: UInt8[np.ndarray, "h w 3"] | None = field(repr=False)
    """The image with its hidden patches as predicted; None for a model that predicts tokens."""
    figure: float
    """Share of the hidden tokens that are predicted right, or mean squared error of the hidden pixels in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a run predicts, or why there is nothing to show."""

    shown: Sequence[Prediction] = ()
    tokenizer: Tokenizer | None = None
    mask_ratio: float = 0.75
    norm_pix: bool = False
    """Predicted pixels were normalised a patch; they are shown with the true mean and spread of their patch."""
    missing: str = ""
    """Why there are none, as a sentence."""


def rebuild_model(run: Path) -> MaskedModel | None:
    """The whole model of a run; None where it has no decoder, or one whose heads nobody knows."""
    file = run / MODEL_FILE
    if not file.is_file():
        return None
    manifest, settings, state = read_manifest(run), _settings(run), read_weights(file)
    data, outputs = manifest["data"], int(state["decoder_pred.weight"].shape[0])
    model: MaskedModel
    if manifest.get("kind") == "import":
        told = manifest.get("decoder") or {}
        if told.get("heads") is None:
            return None
        encoder = timm.create_model(manifest["model"]["name"], **manifest["model"]["kwargs"], num_classes=0)
        model = MaskedImageModel(
            encoder,
            outputs,
            decoder_dim=told["dim"],
            decoder_depth=told["depth"],
            decoder_heads=told["heads"],
            mean=data["mean"],
            std=data["std"],
        )
    else:
        size = data["image_size"]
        model, _ = build_model(
            settings["model"],
            image_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
            patch_size=settings["patch_size"],
            channels=data["channels"],
            output_dim=outputs,
            mean=data["mean"],
            std=data["std"],
            encoder=settings.get("encoder", "visible"),
            decoder=settings.get("decoder", "self"),
            decoder_dim=settings.get("decoder_dim"),
            decoder_depth=settings.get("decoder_depth"),
            decoder_heads=settings.get("decoder_heads"),
        )
    model.load_mae_state(state)
    return model.eval()


@torch.no_grad()
def look_at_predictions(
    run: Path, encoder: Encoder, source: ImageSource, places: Sequence[int], device: str = "cpu"
) -> Predictions:
    """Hide patches of a few images, as the training did, and let the run predict them.

    Parameters
    ----------
    run
        A run directory.
    encoder
        The run's encoder, for the size of the images.
    source, places
        Which images.
    device
        Where to compute.

    Returns
    -------
    Predictions
        With `missing` instead of pictures where the run holds no decoder, or its tokenizer is gone.
    """
    settings, manifest = _settings(run), read_manifest(run)
    model = rebuild_model(run)
    if model is None:
        return Predictions(missing="This run holds no decoder, so there are no predictions to show.")
    if encoder.channels != source.channels:
        return Predictions(missing="The model takes images of other channels, so there are no predictions to show.")
    model = model.to(device)
    ratio = float(settings.get("mask_ratio", 0.75))
    view = view_for(encoder, source.view)
    images = torch.stack([eval_view(source[i][0], view) for i in places]).to(device)
    seed, index = int(settings.get("seed", 0)), torch.tensor(places)
    if settings.get("mask_kind") == "block":
        mask = block_masks(seed, 0, index, model.grid, ratio).to(device)
    else:
        mask = random_masks(seed, 0, index, model.num_patches, ratio).to(device)
    predictions = model(images, mask).float()
    _, hidden = split_mask(mask)
    target = settings.get("target", "pixel")
    if target == "token":
        return _tokens(model, images, mask, hidden, predictions, run, ratio)
    side, channels = model.patch_size, model.channels
    if target != "pixel" or predictions.shape[2] != side * side * channels:
        return Predictions(missing=f"The target `{target}` of this run is nothing that can be shown as a picture.")
    norm_pix = bool(settings.get("norm_pix", True))
    mean, std = (torch.tensor(manifest["data"][key], device=images.device) for key in ("mean", "std"))
    return _pixels(model, images, mask, hidden, predictions, (mean, std), ratio, norm_pix)


def _tokens(
    model: MaskedModel,
    images: Float[Tensor, "b c h w"],
    mask: Bool[Tensor, "b n"],
    hidden: Int64[Tensor, "b hidden"],
    predictions: Float[Tensor, "b hidden k"],
    run: Path,
    ratio: float,
) -> Predictions:
    manifest = read_manifest(run)
    try:
        tokenizer = load_tokenizer(_tokenizer_of(run, manifest)).to(images.device)
    except InputError as error:
        return Predictions(missing=f"The tokenizer of this run cannot be opened, so there is no truth to show: {error}")
    wanted = manifest.get("tokenizer_fingerprint")
    if wanted is not None and tokenizer.fingerprint() != wanted:
        return Predictions(missing="The tokenizer has been fitted anew since this run, so there is no truth to show.")
    if tokenizer.requires:
        return Predictions(missing=f"Tokens of kind {tokenizer.kind} follow from no picture, so none is shown.")
    true = tokenizer.encode(images)
    predicted = true.scatter(1, hidden, predictions.argmax(dim=2))
    right = (true == predicted).gather(1, hidden).float().mean(dim=1)
    shown = [
        Prediction(
            picture=to_rgb(images[i].cpu().numpy()),
            mask=mask[i].reshape(model.grid).cpu().numpy(),
            true=true[i].reshape(model.grid).cpu().numpy(),
            predicted=predicted[i].reshape(model.grid).cpu().numpy(),
            rebuilt=None,
            figure=float(right[i]),
        )
        for i in range(len(images))
    ]
    return Predictions(shown=shown, tokenizer=tokenizer, mask_ratio=ratio)


def _pixels(
    model: MaskedModel,
    images: Float[Tensor, "b c h w"],
    mask: Bool[Tensor, "b n"],
    hidden: Int64[Tensor, "b hidden"],
    predictions: Float[Tensor, "b hidden d"],
    statistics: tuple[Tensor, Tensor],
    ratio: float,
    norm_pix: bool,
) -> Predictions:
    patches = patchify(images, model.patch_size)
    mean, std = statistics
    channels = model.channels
    truth = take_rows(patches, hidden)
    if norm_pix:
        scaled = ((truth.reshape(*truth.shape[:2], -1, channels) - mean) / std).flatten(2)
        variance, centre = torch.var_mean(scaled, dim=-1, keepdim=True)
        predictions = predictions * (variance + 1e-6).sqrt() + centre
    pixels = (predictions.reshape(*truth.shape[:2], -1, channels) * std + mean).flatten(2)
    errors = (pixels - truth).square().mean(dim=(1, 2))
    whole = patches.scatter(1, hidden[..., None].expand(-1, -1, patches.shape[2]), pixels.clamp(0, 1))
    rebuilt = unpatchify(whole, model.grid, model.patch_size)
    shown = [
        Prediction(
            picture=to_rgb(images[i].cpu().numpy()),
            mask=mask[i].reshape(model.grid).cpu().numpy(),
            true=None,
            predicted=None,
            rebuilt=to_rgb(rebuilt[i].cpu().numpy()),
            figure=float(errors[i]),
        )
        for i in range(len(images))
    ]
    return Predictions(shown=shown, mask_ratio=ratio, norm_pix=norm_pix)


def unpatchify(patches: Float[Tensor, "b n d"], grid: tuple[int, int], side: int) -> Float[Tensor, "b c h w"]:
    """The inverse of `patchify`: patches in row-major order, channels last within a patch, as images."""
    rows, columns = grid
    cut = patches.reshape(len(patches), rows, columns, side, side, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * side, columns * side)


def _tokenizer_of(run: Path, manifest: dict[str, Any]) -> str:
    """Where it lies as seen from the run, which holds when the two were moved together; else where it was."""
    beside = manifest.get("tokenizer_from_here")
    return str(run / beside if beside and (run / beside).is_dir() else manifest.get("tokenizer"))


def _settings(run: Path) -> dict[str, Any]:
    """What config.yaml of the run says."""
    file = run / "config.yaml"
    found = yaml.safe_load(file.read_text()) if file.is_file() else None
    return found if isinstance(found, dict) else {}
