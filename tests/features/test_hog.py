"""HOG against scikit-image, on whole images, on each patch, and with a window around it."""

import numpy as np
import pytest
import torch
from feature_samples import images, view
from skimage.feature import hog

from clustermim.errors import InputError
from clustermim.features.hog import NORMS, strongest_gradient
from clustermim.features.patches import make_features


def reference(image: np.ndarray, cell: int, block: int, orientations: int = 9, norm: str = "L2-Hys") -> np.ndarray:
    """(blocks down, blocks across, block, block, orientations) of one (C, H, W) image."""
    return hog(
        image.astype(np.float64),
        orientations=orientations,
        pixels_per_cell=(cell, cell),
        cells_per_block=(block, block),
        block_norm=norm,
        channel_axis=0,
        feature_vector=False,
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "none"])
@pytest.mark.parametrize(("orientations", "cell", "block"), [(9, 4, 2), (6, 8, 1), (9, 3, 2)])
def test_one_patch_of_the_whole_image_is_scikit_image_s_vector(
    channels: int, norm: str, orientations: int, cell: int, block: int
) -> None:
    side = 24
    x = images(side, side, channels)
    spec = f"hog?orientations={orientations}&cell={cell}&block={block}&norm={norm}"
    got = make_features(spec, patch_size=side, view=view(side, side, channels))(x)
    spelt = {"l1": "L1", "l1-sqrt": "L1-sqrt", "l2": "L2", "l2-hys": "L2-Hys"}[norm]
    want = np.stack([reference(image.numpy(), cell, block, orientations, spelt).ravel() for image in x])
    assert got.shape == (len(x), 1, want.shape[1])
    np.testing.assert_allclose(got[:, 0].numpy(), want, atol=1e-5)


@pytest.mark.parametrize(("side", "cell"), [(8, 4), (8, 2), (4, 4), (8, 8)])
def test_each_patch_is_a_block_of_the_image_s_cells(side: int, cell: int) -> None:
    x = images(16, 24)
    got = make_features(f"hog?cell={cell}", patch_size=side, view=view())(x)
    across = side // cell
    for number, image in enumerate(x):
        blocks = reference(image.numpy(), cell, across)[::across, ::across]
        np.testing.assert_allclose(got[number].numpy(), blocks.reshape(got.shape[1:]), atol=1e-5)


def test_grey_steps() -> None:
    # Few levels of grey make gradients along the axes, where bins begin, and empty cells.
    x = (images(16, 24, 1) * 20).round() / 20
    x[:, :, :8, :8] = 0.5
    got = make_features("hog", patch_size=8, view=view(channels=1))(x)
    for number, image in enumerate(x):
        blocks = reference(image.numpy(), 4, 2)[::2, ::2]
        np.testing.assert_allclose(got[number].numpy(), blocks.reshape(6, 36), atol=1e-5)
    assert not got[:, 0, :9].any()  # a cell without an edge has none


def test_a_window_is_the_image_continued_by_reflection() -> None:
    x = images(16, 24)
    got = make_features("hog?context=12&cell=4&block=2", patch_size=8, view=view())(x)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    for number, image in enumerate(padded):
        # Windows start every 8 pixels, so all lie on the lattice of cells of 4.
        blocks = reference(image, 4, 2)
        for row in range(2):
            for column in range(3):
                want = blocks[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                np.testing.assert_allclose(got[number, 3 * row + column].numpy(), want.ravel(), atol=1e-5)


def test_a_window_whose_cells_are_not_those_of_its_neighbours() -> None:
    # Patches of 4, windows of 6, cells of 3: naive means over each cell of each window.
    x = images(8, 12, 1, count=2)
    got = make_features("hog?context=6&cell=3&norm=none&orientations=4", patch_size=4, view=view(8, 12, 1))(x)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    length, (down, across) = strongest_gradient(padded)
    angle = torch.rad2deg(torch.atan2(down, across)) % 180
    for row in range(2):
        for column in range(3):
            cells = []
            for i in range(2):
                for j in range(2):
                    top, left = 4 * row + 3 * i, 4 * column + 3 * j
                    a, m = (t[:, top : top + 3, left : left + 3] for t in (angle, length))
                    cells += [(m * ((a >= 45 * o) & (a < 45 * (o + 1)))).mean((1, 2)) for o in range(4)]
            torch.testing.assert_close(got[:, 3 * row + column], torch.stack(cells, 1), atol=1e-5, rtol=1e-4)


def test_brightness_and_contrast_play_no_part() -> None:
    features = make_features("hog", patch_size=8, view=view(channels=1))
    x = images(channels=1)
    torch.testing.assert_close(features(x), features(0.5 * x + 0.2), atol=1e-3, rtol=1e-3)
    assert not features(torch.full((1, 1, 16, 24), 0.5)).any()


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("hog?cell=3", "cell = 1, 2, 4, 8"),
        ("hog?cell=0", "cell = 1, 2, 4, 8"),
        ("hog?block=3", "block from 1 to 2"),
        ("hog?orientations=0", "at least 1"),
        ("hog?norm=l3", "one of l2-hys"),
        ("hog?context=9", "context = 10"),
        ("hog?context=64", "at most 38"),
        ("hog?orientation=9", "Did you mean 'orientations'"),
        ("hog:resnet", "no name"),
    ],
)
def test_bad_options_are_told(spec: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make_features(spec, patch_size=8, view=view())
