"""What can be known to be wrong with a tokenizer or a cell before anything is computed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from clustermim.data.masks import hidden_count
from clustermim.data.sources import ImageSource
from clustermim.encoders.presets import model_kwargs
from clustermim.errors import InputError
from clustermim.features.patches import make_features
from clustermim.mim.building import build_model
from clustermim.mim.pretraining import PretrainConfig
from clustermim.studies.pieces import Cell
from clustermim.tokenizers.vqvae.training import VQVAEConfig
from clustermim.training.launch import resolve_precision
from clustermim.verbs.pretrain_encoder import check_predict_ratio
from clustermim.verbs.pretrain_run import check_batch
from clustermim.verbs.pretrain_targets import check_target_options

_PLACED = "{"


def check_tokenizer(name: str, settings: Mapping[str, Any], train: ImageSource, labelled: bool) -> None:
    """Patch side, features, vocabulary and kind, against the images.

    Raises
    ------
    InputError
        Names the tokenizer and what does not fit.
    """
    try:
        train.view.check_patch_size(settings["patch_size"])
        kind, features = settings.get("kind", "kmeans"), settings.get("features", "pixel")
        learned = {one.name for one in fields(VQVAEConfig)}
        if kind != "vqvae" and (given := sorted(set(settings) & learned)):
            raise InputError(f"{', '.join(given)}: only for kind vqvae, not for {kind}. Leave it out.")
        if kind == "vqvae" and "features" in settings:
            raise InputError("features: not for kind vqvae, which learns from pixels. Leave it out.")
        height, width = train.view.image_size
        patches = len(train) * (height // settings["patch_size"]) * (width // settings["patch_size"])
        k = settings.get("k", 50)
        if kind in ("kmeans", "random-centroids", "vqvae", "random") and not 2 <= k <= patches:
            raise InputError(f"k = {k}: {len(train)} images have {patches} patches; k must lie from 2 to that.")
        if "align_with" in settings and not labelled:
            raise InputError(f"align_with labels: {train.name} has none. Leave it out.")
        if kind in ("kmeans", "random-centroids") and isinstance(features, str) and _PLACED not in features:
            make_features(features, patch_size=settings["patch_size"], view=train.view)
    except InputError as problem:
        raise InputError(f"tokenizers: {name}: {problem}") from None


def check_cell(where: str, settings: Mapping[str, Any], train: ImageSource, lrs: Sequence[float]) -> None:
    """Target, model, masks and batch, against each other and the images.

    Raises
    ------
    InputError
        Names the target and what contradicts what.
    """
    view, target = train.view, settings["target"]
    try:
        check_target_options(
            target,
            token={
                "tokenizer": settings.get("tokenizer"),
                "label_smoothing": settings.get("label_smoothing") or None,
                "soft_targets": settings.get("soft_targets") or None,
                "token_weights": settings.get("token_weights"),
            },
            pixel={"norm_pix": settings.get("norm_pix")},
            feature={"features": settings.get("features"), "feature_norm": settings.get("feature_norm")},
        )
        side = settings["patch_size"]
        view.check_patch_size(side)
        check_predict_ratio(settings.get("predict_ratio", 1.0), settings.get("decoder", "self"))
        model_kwargs(settings["model"], view.image_size, side, view.channels)
        # A small model of the same architecture: the decoder's options are what can contradict it.
        decoder = {
            key: settings[key]
            for key in ("decoder", "decoder_dim", "decoder_depth", "decoder_heads")
            if key in settings
        }
        build_model(
            "vit_micro",
            image_size=view.image_size,
            patch_size=side,
            channels=view.channels,
            output_dim=2,
            mean=view.mean,
            std=view.std,
            encoder=settings["encoder"],
            **decoder,
        )
        hidden_count((view.image_size[0] // side) * (view.image_size[1] // side), settings["mask_ratio"])
        known = {one.name for one in fields(PretrainConfig)} & set(settings) - {"checkpoint_every"}
        for lr in lrs:
            config = PretrainConfig(**{key: settings[key] for key in known}, base_lr=lr)
            check_batch(train, config, 1)
        if target == "feature":
            make_features(settings["features"], patch_size=side, view=view)
    except InputError as problem:
        raise InputError(f"{where}: {problem}") from None


def check_precisions(cells: Iterable[Cell], device: str) -> None:
    """Whether the device can train each cell in the precision that it asks for.

    Raises
    ------
    InputError
        It cannot; names the cell.
    """
    for cell in cells:
        try:
            resolve_precision(cell.settings.get("precision", "auto"), device)
        except InputError as problem:
            change = "In a recipe: --set pretrain.precision=32-true."
            raise InputError(f"{cell.name}: {problem} {change}") from None
