import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clustermim.render.palette import token_colours
from clustermim.render.sheets import (
    Group,
    Tile,
    enlarge,
    mosaic,
    picture_sheet,
    png,
    rebuilt,
    side_by_side,
    similarity_order,
    tile_side,
    to_rgb,
    token_map,
)


def flat(colour: tuple[int, int, int], side: int = 4) -> np.ndarray:
    return np.full((side, side, 3), colour, dtype=np.uint8)


@pytest.mark.parametrize("k", [10, 50, 1000])
def test_each_token_is_drawn_once(k: int) -> None:
    colours = token_colours(np.arange(k))
    side = tile_side(k)
    tiles = [Tile(picture=flat(tuple(int(v) for v in c)), caption=str(i), bar=0.5) for i, c in enumerate(colours)]
    sheet = np.asarray(picture_sheet([Group(title="", tiles=tiles, side=side)], title="T"))
    codes = sheet.astype(int) @ np.asarray([65536, 256, 1])
    drawn = dict(zip(*np.unique(codes, return_counts=True), strict=True))
    area = (side // 4 * 4) ** 2
    for colour in colours.astype(int) @ np.asarray([65536, 256, 1]):
        assert drawn[colour] == area


def test_nothing_is_drawn_over_the_edge_however_wide_a_tile() -> None:
    tiles = [Tile(picture=flat((200, 0, 0)), caption="a caption much wider than its picture") for _ in range(9)]
    sheet = np.asarray(
        picture_sheet([Group(title="g", tiles=tiles, side=40)], title="T", note="words " * 80, width=500)
    )
    assert sheet.shape[1] == 500
    assert (sheet[:, -10:] == sheet[0, 0]).all()


@pytest.mark.parametrize("bar", [0.0, 0.01, 0.5, 1.0])
def test_a_bar_is_as_long_as_it_says(bar: float) -> None:
    blue = (31, 102, 176)
    sheet = np.asarray(
        picture_sheet([Group(title="", tiles=[Tile(picture=flat((0, 0, 0)), bar=bar)], side=80)], title="")
    )
    length = (sheet == blue).all(-1).sum(1).max()
    assert length == (0 if bar == 0 else max(1, round(80 * bar)))


def test_light_and_dark_differ_only_in_their_ground() -> None:
    group = [Group(title="g", tiles=[Tile(picture=flat((1, 2, 3)), caption="1")], side=40)]
    day, night = (picture_sheet(group, title="T", dark=dark) for dark in (False, True))
    assert day.size == night.size
    assert np.asarray(day).mean() > 200 > 60 > np.asarray(night).mean()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_any_channels_become_pictures(channels: int) -> None:
    picture = to_rgb(np.linspace(-0.5, 1.5, channels * 6, dtype=np.float32).reshape(channels, 2, 3))
    assert picture.shape == (2, 3, 3)
    assert picture.dtype == np.uint8


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))
@settings(deadline=None, max_examples=30)
def test_enlarging_keeps_whole_pixels(rows: int, columns: int, height: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    large = enlarge(picture, height)
    assert large.shape[0] <= height
    if rows <= height:
        factor = height // rows
        assert (large[::factor, ::factor] == picture).all()


def test_a_mosaic_keeps_each_picture() -> None:
    pictures = [flat((i, i, i), side=3) for i in range(5)]
    whole = mosaic(pictures, columns=2, gap=1)
    assert whole.shape == (11, 7, 3)
    assert [(whole == i).all(-1).sum() for i in range(5)] == [9] * 5


def test_a_map_shows_each_patch_in_its_tokens_colour() -> None:
    ids = np.arange(6).reshape(2, 3)
    colours = token_colours(np.arange(6))
    drawn = token_map(np.zeros((4, 6, 3), dtype=np.uint8), ids, colours, cell=10)
    assert drawn.shape == (20, 30, 3)
    assert (drawn[::10, ::10] == colours[ids]).all()  # the frame is pure
    # Inside, hue is kept: channels scale together.
    assert np.allclose(drawn[5::10, 5::10], colours[ids] * 0.7, atol=1)


def test_a_map_writes_ids_where_they_fit_and_nowhere_else() -> None:
    image, ids, colours = np.full((2, 2, 3), 255, np.uint8), np.full((1, 1), 888), np.full((889, 3), 200, np.uint8)
    assert (token_map(image, ids, colours, cell=16) == 200).all()
    assert (token_map(image, ids, colours, cell=40) < 100).any()


def test_an_image_rebuilt_of_its_own_patches_is_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    patches = [image[r : r + 2, c : c + 2] for r in (0, 2) for c in (0, 2, 4)]
    assert (rebuilt(np.arange(6).reshape(2, 3), dict(enumerate(patches))) == image).all()


def test_similarity_puts_dark_first_and_is_a_permutation() -> None:
    pictures = [flat((v, v, v)) for v in (200, 0, 100, 50)]
    assert similarity_order(pictures).tolist() == [3, 0, 2, 1]
    assert sorted(similarity_order([flat((7, 7, 7))] * 3).tolist()) == [0, 1, 2]


def test_side_by_side_has_one_height() -> None:
    assert side_by_side([flat((0, 0, 0), 8), np.zeros((4, 8, 3), np.uint8)], 16, gap=4).shape == (16, 16 + 4 + 32, 3)


def test_png_is_lossless() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(png(picture)))) == picture).all()
