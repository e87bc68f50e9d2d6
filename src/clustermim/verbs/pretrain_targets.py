"""What `clustermim pretrain` shall predict: which options belong to which target, and what has to be made for it."""

from collections.abc import Mapping
from typing import Any, Literal

from lightning_fabric import Fabric

from clustermim.data.loaders import make_loader
from clustermim.data.streaming.source import AnySource
from clustermim.errors import InputError
from clustermim.features.patches import PatchFeatures, make_features
from clustermim.mim.frequencies import count_tokens, inverse_sqrt_weights
from clustermim.mim.targets import TARGETS, Target, TargetOptions, TokenTarget, make_target

TokenWeights = Literal["equal", "inverse-sqrt"]


def check_target_options(target: str, **given: Mapping[str, Any]) -> None:
    """Refuse, before any data is opened, an unknown target, options of another one, and missing needs.

    Parameters
    ----------
    target
        What was asked for.
    given
        For each target its options; None where one was left at its default.

    Raises
    ------
    InputError
        Names the option and the target it belongs to.
    """
    needs = {"token": "tokenizer", "feature": "features"}
    if target not in TARGETS or (target in needs and given[target][needs[target]] is None):
        make_target(target, TargetOptions(patch_size=1, mean=(), std=()))  # raises, in the target's own words
    for owner, options in given.items():
        for name, value in options.items():
            if owner != target and value is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} is for --target {owner}, not for --target {target}: leave it out, or "
                    f"use --target {owner}."
                )


def target_features(
    features: str | PatchFeatures, patch_size: int, source: AnySource, batch_size: int, workers: int | None
) -> PatchFeatures:
    """The description that --target feature predicts, fitted to the eval views of the source where it needs that.

    Raises
    ------
    InputError
        Unknown features, weights that cannot be had, or another patch size or channels.
    """
    described = make_features(features, patch_size=patch_size, view=source.view)
    if described.needs_fit:
        loader = make_loader(source, source.view, batch_size=batch_size, train=False, workers=workers)
        described.fit(lambda: (batch.images for batch in loader.epoch()))
    return described


def weigh_by_frequency(target: Target, source: AnySource, fabric: Fabric, batch_size: int, workers: int | None) -> None:
    """Count the tokens in one pass over the eval views, each process alone, and weigh the target's loss by them."""
    assert isinstance(target, TokenTarget)  # check_target_options
    loader = make_loader(source, source.view, batch_size=batch_size, train=False, device=fabric.device, workers=workers)
    counts = count_tokens(target.tokenizer.to(fabric.device), loader)
    target.weights = inverse_sqrt_weights(counts).to(fabric.device)
