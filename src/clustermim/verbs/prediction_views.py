"""What a masked image model predicts of hidden patches: its tokens beside the true ones, or a reconstruction."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from clustermim.data.masks import block_masks, random_masks
from clustermim.data.sources import ImageSource
from clustermim.data.views import eval_view
from clustermim.encoders.contract import Encoder
from clustermim.encoders.weights import read_weights
from clustermim.errors import InputError
from clustermim.evaluation.evaluating import view_for
from clustermim.mim.building import build_model
from clustermim.mim.contract import MaskedModel
from clustermim.mim.model import MaskedImageModel
from clustermim.mim.predicting import Prediction, predict_pixels, predict_tokens
from clustermim.mim.starting import MODEL_FILE
from clustermim.runs import read_manifest
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer


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
    target = settings.get("target", "pixel")
    if target == "token":
        tokenizer = _true_tokenizer(run, manifest, device)
        if isinstance(tokenizer, str):
            return Predictions(missing=tokenizer)
        return Predictions(shown=predict_tokens(model, tokenizer, images, mask), tokenizer=tokenizer, mask_ratio=ratio)
    if target != "pixel" or model.output_dim != model.patch_size**2 * model.channels:
        return Predictions(missing=f"The target `{target}` of this run is nothing that can be shown as a picture.")
    norm_pix, data = bool(settings.get("norm_pix", True)), manifest["data"]
    shown = predict_pixels(model, images, mask, mean=data["mean"], std=data["std"], norm_pix=norm_pix)
    return Predictions(shown=shown, mask_ratio=ratio, norm_pix=norm_pix)


def _true_tokenizer(run: Path, manifest: dict[str, Any], device: str) -> Tokenizer | str:
    """The tokenizer that a run was trained on, or a sentence that says why it cannot be had."""
    try:
        tokenizer = load_tokenizer(_tokenizer_of(run, manifest)).to(device)
    except InputError as error:
        return f"The tokenizer of this run cannot be opened, so there is no truth to show: {error}"
    wanted = manifest.get("tokenizer_fingerprint")
    if wanted is not None and tokenizer.fingerprint() != wanted:
        return "The tokenizer has been fitted anew since this run, so there is no truth to show."
    if tokenizer.requires:
        return f"Tokens of kind {tokenizer.kind} follow from no picture, so none is shown."
    return tokenizer


def _tokenizer_of(run: Path, manifest: dict[str, Any]) -> str:
    """Where it lies as seen from the run, which holds when the two were moved together; else where it was."""
    beside = manifest.get("tokenizer_from_here")
    return str(run / beside if beside and (run / beside).is_dir() else manifest.get("tokenizer"))


def _settings(run: Path) -> dict[str, Any]:
    """What config.yaml of the run says."""
    file = run / "config.yaml"
    found = yaml.safe_load(file.read_text()) if file.is_file() else None
    return found if isinstance(found, dict) else {}
