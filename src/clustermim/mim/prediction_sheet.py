"""Predictions as pictures: a tile an image, with what was hidden, what is predicted, what is true."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

from clustermim.mim.predicting import Prediction
from clustermim.render.encoder_pictures import component_maps, hide_patches
from clustermim.render.sheets import Tile, side_by_side, token_map

HEIGHT = 160
"""Of a picture on a sheet, in pixels."""

Colours = UInt8[np.ndarray, "k 3"]


@dataclass(frozen=True, kw_only=True)
class PredictionSheet:
    """What there is to draw."""

    title: str
    note: str
    tiles: list[Tile] = field(repr=False)


def prediction_sheet(
    shown: Sequence[Prediction],
    captions: Sequence[str],
    *,
    mask_ratio: float,
    norm_pix: bool = False,
    colours: Colours | None = None,
) -> PredictionSheet:
    """A tile for each image.

    Parameters
    ----------
    shown
        Predictions of one kind.
    captions
        Names of the images.
    mask_ratio
        Share of the patches that were hidden.
    norm_pix
        Whether pixels were predicted as patches of mean 0 and variance 1.
    colours
        (K, 3) colour of each token; needed for predictions of tokens.
    """
    hidden = f"{100 * mask_ratio:.0f} % of the patches hidden (grey)"
    if shown[0].rebuilt is not None:
        return _pixels(shown, captions, hidden, norm_pix)
    if shown[0].described is not None:
        return _features(shown, captions, hidden)
    assert colours is not None, "tokens are shown by their colours"
    return _tokens(shown, captions, hidden, colours)


def _tokens(shown: Sequence[Prediction], captions: Sequence[str], hidden: str, colours: Colours) -> PredictionSheet:
    def parts(found: Prediction) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        assert found.true is not None and found.predicted is not None
        cell = max(2, HEIGHT // found.mask.shape[0])
        return [token_map(found.picture, ids, colours, cell=cell) for ids in (found.predicted, found.true)]

    right = 100 * float(np.mean([found.figure for found in shown]))
    return PredictionSheet(
        title="Predicted tokens",
        note=(
            f"Each image with {hidden}, the likeliest token of each hidden patch (visible patches have their true "
            f"one), the true tokens, and the image whole; like tokens have like colours. {right:.0f} % of the hidden "
            f"tokens of these images are predicted right."
        ),
        tiles=_tiles(
            shown,
            captions,
            parts,
            "the predicted and the true tokens",
            lambda found: f"{100 * found.figure:.0f} % right",
        ),
    )


def _pixels(shown: Sequence[Prediction], captions: Sequence[str], hidden: str, norm_pix: bool) -> PredictionSheet:
    def parts(found: Prediction) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        assert found.rebuilt is not None
        return [found.rebuilt]

    note = f"Each image with {hidden}, with the hidden patches as predicted, and whole."
    if norm_pix:
        note += (
            " The model predicts patches of mean 0 and variance 1 (norm-pix); they are shown with the true mean and "
            "spread of each patch, which it was not told."
        )
    return PredictionSheet(
        title="Reconstructions",
        note=note,
        tiles=_tiles(shown, captions, parts, "its reconstruction", lambda found: f"squared error {found.figure:.4f}"),
    )


def _features(shown: Sequence[Prediction], captions: Sequence[str], hidden: str) -> PredictionSheet:
    rows, columns = shown[0].mask.shape
    true = np.stack([found.described for found in shown if found.described is not None])
    foretold = np.stack([found.foretold for found in shown if found.foretold is not None])
    # Coloured as the truth is, whatever is predicted: so its colours are the same in every epoch, and those of a
    # prediction that is right are these.
    maps = zip(component_maps(foretold, (rows, columns), like=true), component_maps(true, (rows, columns)), strict=True)
    pairs = {id(found): pair for found, pair in zip(shown, maps, strict=True)}
    return PredictionSheet(
        title="Predicted features",
        note=(
            f"Each image with {hidden}, the predicted features of each hidden patch (visible patches have their true "
            "ones), the true features, and the image whole; red, green and blue are the first three principal "
            "components of the true features, so like colours mean like features."
        ),
        tiles=_tiles(
            shown,
            captions,
            lambda found: pairs[id(found)],
            "the predicted and the true features as colours",
            lambda found: f"squared error {found.figure:#.3g}",
        ),
    )


def _tiles(
    shown: Sequence[Prediction],
    captions: Sequence[str],
    parts: Callable[[Prediction], Sequence[UInt8[np.ndarray, "_ _ 3"]]],
    told: str,
    figure: Callable[[Prediction], str],
) -> list[Tile]:
    """The image with hidden patches, the parts of its own, the image."""
    tiles = []
    for found, name in zip(shown, captions, strict=True):
        pictures = [hide_patches(found.picture, found.mask), *parts(found), found.picture]
        caption = f"{name}: {figure(found)}"
        described = f"{caption}: the image with hidden patches, {told}, the image"
        tiles.append(Tile(picture=side_by_side(pictures, HEIGHT), caption=caption, description=described))
    return tiles
