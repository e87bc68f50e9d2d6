import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.errors import InputError
from clustermim.features.patches import patchify
from clustermim.tokenizers.tokenizer import Tokenizer
from clustermim.verbs.token_views import legend, look_at_tokens, map_tiles, vocabulary_tiles
from clustermim.verbs.tokenizer_fit import fit_tokenizer
from clustermim.verbs.tokenizer_show import show_tokenizer
from page_checker import check

FEW = DataOptions(limit=60)
SPECS = {
    "pixel": {"features": "pixel", "k": 8},
    "standardised": {"features": "pixel?standardise=true", "k": 8},
    "context": {"features": "pixel?context=4", "k": 8},
    "cosine": {"features": "pixel", "k": 8, "metric": "cosine"},
    "random-centroids": {"kind": "random-centroids", "k": 8},
    "identity": {"kind": "identity"},
    "random": {"kind": "random", "k": 8},
    "position": {"kind": "position"},
    "oracle": {"kind": "oracle"},
}


def fitted(name: str) -> Tokenizer:
    return fit_tokenizer("digits", patch_size=2, options=FEW, **SPECS[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_can_be_looked_at(name: str) -> None:
    tokenizer, source = fitted(name), open_source("digits", FEW)
    view = look_at_tokens(tokenizer, source, examples=3)
    k = tokenizer.vocab_size
    assert sorted(view.tokens.tolist()) == list(range(k))
    assert (np.diff(view.counts[view.tokens]) <= 0).all()
    assert view.counts.sum() == 60 * 16
    assert (view.images_with <= np.minimum(view.counts, 60)).all()
    assert ((view.images_with > 0) == (view.counts > 0)).all()
    assert len({picture.shape for picture in view.pictures}) == 1
    assert len(set(view.colours().values())) == k
    tiles = vocabulary_tiles(view)
    assert [int(tile.caption.split()[0]) for tile in tiles] == view.tokens.tolist()
    assert max(tile.bar or 0.0 for tile in tiles) == 1.0
    assert len(map_tiles(view)) == 3


def test_usage_is_that_of_the_ids() -> None:
    tokenizer, source = fitted("pixel"), open_source("digits", FEW)
    view = look_at_tokens(tokenizer, source, examples=60)
    images = torch.stack([source[i][0] for i in range(60)])
    ids = tokenizer.encode(images).numpy()
    assert view.counts.tolist() == np.bincount(ids.ravel(), minlength=8).tolist()
    assert view.images_with.tolist() == [int((ids == token).any(1).sum()) for token in range(8)]
    assert legend(view) == np.unique(ids).tolist()
    assert sorted(m.ids.ravel().tolist() for m in view.maps) == sorted(row.tolist() for row in ids)


def test_pixel_centroids_are_the_mean_patches() -> None:
    tokenizer, source = fitted("pixel"), open_source("digits", FEW)
    view = look_at_tokens(tokenizer, source)
    assert view.shows == "its centroid"
    images = torch.stack([source[i][0] for i in range(60)])
    patches = patchify(images, 2).flatten(0, 1)
    ids = tokenizer.encode(images).flatten()
    for token, picture in zip(view.tokens.tolist(), view.pictures, strict=True):
        mean = patches[ids == token].mean(0).reshape(2, 2) * 255
        # K-means may stop one assignment short of its fixed point.
        assert np.abs(picture[..., 0] - mean.numpy()).max() < 12


def test_nearest_patches_are_the_nearest() -> None:
    tokenizer, source = fitted("standardised"), open_source("digits", FEW)
    view = look_at_tokens(tokenizer, source)
    assert view.shows == "4 patches nearest to its centroid"
    images = torch.stack([source[i][0] for i in range(60)])
    assert tokenizer.features is not None
    assert tokenizer.codebook is not None
    distance = tokenizer.codebook.distances(tokenizer.features(images).flatten(0, 1))
    ids = tokenizer.encode(images).flatten()
    patches = patchify(images, 2).flatten(0, 1)
    for token, picture in zip(view.tokens.tolist(), view.pictures, strict=True):
        first = torch.round(picture_patch(picture, 2) * 255) / 255
        near = distance[ids == token, token]
        least = patches[ids == token][near <= near.min() + 1e-5]
        assert any(torch.allclose(first, torch.round(p * 255) / 255, atol=2e-3) for p in least)


def picture_patch(picture: np.ndarray, side: int) -> torch.Tensor:
    """The first patch of a mosaic of enlarged patches, as `patchify` orders it."""
    step = 46 // side
    return torch.from_numpy(picture[: side * step : step, : side * step : step, 0].copy()).float().reshape(-1) / 255


def test_rectangular_colour_images_without_labels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 12, 3), dtype=np.uint8)
    tokenizer = fit_tokenizer(images, k=5, patch_size=4)
    view = look_at_tokens(tokenizer, open_source(images), examples=4)
    assert [m.ids.shape for m in view.maps] == [(2, 3)] * 4
    assert [m.name for m in view.maps] == ["image 0", "image 6", "image 12", "image 19"]
    assert len(map_tiles(view)) == 4


def test_a_very_large_vocabulary_is_cut_and_says_so(tmp_path: Path) -> None:
    shown = show_tokenizer(fitted("identity"), out=tmp_path / "o", most=20, options=FEW)
    assert shown.view.listed == len(vocabulary_tiles(shown.view)) == 20
    # Beside them, those that the maps need for their colours and their legend.
    assert set(shown.view.tokens[20:].tolist()) | set(range(20)) >= set(legend(shown.view))
    assert len(vocabulary_tiles(shown.view, only=legend(shown.view))) == len(legend(shown.view))
    assert len(shown.view.tokens) < 20 + 12 * 16 + 1
    assert "the 20 most used of 960" in shown.page.read_text()
    assert len(shown.rows()) == 960


def test_the_verb_writes_sheets_page_and_numbers(tmp_path: Path) -> None:
    fit_tokenizer("digits", patch_size=2, options=FEW, out=tmp_path / "tok", **SPECS["pixel"])  # type: ignore[arg-type]
    shown = show_tokenizer(
        str(tmp_path / "tok"), data="digits", out=tmp_path / "show", json=tmp_path / "n.json", options=FEW
    )
    for path in (shown.vocabulary, shown.token_maps):
        assert Image.open(path).size[0] == 1400
    found = check(shown.page.read_text())
    pictures = [image for image in found.images if "Token" in str(image["alt"])]
    assert len(pictures) == 8 + len(legend(shown.view))
    rows = json.loads((tmp_path / "n.json").read_text())
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert shown.__rich__().row_count == 7
    with pytest.raises(InputError, match="finished"):
        show_tokenizer(str(tmp_path / "tok"), out=tmp_path / "show", options=FEW)


def test_bad_input_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--most"):
        show_tokenizer(fitted("pixel"), out=tmp_path / "o", most=0)
    with pytest.raises(InputError, match="channel"):
        show_tokenizer(
            fitted("pixel"), data=np.zeros((4, 8, 8, 3), np.uint8), out=tmp_path / "o", options=DataOptions(channels=3)
        )
    assert not (tmp_path / "o").exists()
