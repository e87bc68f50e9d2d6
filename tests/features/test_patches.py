"""Cutting images into patches, the spelling of features, and pixel features against naive loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.data.views import ViewConfig
from clustermim.errors import InputError
from clustermim.features.patches import make_features, patchify, unpatchify
from clustermim.features.spelling import parse_spec


def view(height: int = 8, width: int = 12, channels: int = 3) -> ViewConfig:
    mean, std = torch.linspace(0.3, 0.6, channels).tolist(), torch.linspace(0.1, 0.4, channels).tolist()
    return ViewConfig(image_size=(height, width), channels=channels, mean=tuple(mean), std=tuple(std))


def images(height: int = 8, width: int = 12, channels: int = 3, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 100 + width)
    return torch.rand(count, channels, height, width, generator=generator)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), side=st.integers(1, 5), channels=st.integers(1, 5))
def test_patches_are_row_major_and_come_back(rows: int, columns: int, side: int, channels: int) -> None:
    x = torch.arange(2 * channels * rows * side * columns * side).reshape(2, channels, rows * side, columns * side)
    patches = patchify(x.float(), side)
    assert patches.shape == (2, rows * columns, side * side * channels)
    for n in range(rows * columns):
        r, c = divmod(n, columns)
        window = x[:, :, r * side : (r + 1) * side, c * side : (c + 1) * side]
        assert torch.equal(patches[:, n], window.permute(0, 2, 3, 1).flatten(1).float())
    assert torch.equal(unpatchify(patches, (rows, columns), side), x.float())


def test_unpatchify_refuses_patches_that_do_not_fill_the_grid() -> None:
    with pytest.raises(InputError, match="not a 2 × 3 grid"):
        unpatchify(torch.zeros(1, 5, 12), (2, 3), 2)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("context", [4, 6, 10])
def test_pixel_features_equal_naive_loops(channels: int, standardise: bool, context: int) -> None:
    shown, x = view(channels=channels), images(channels=channels)
    features = make_features(f"pixel?standardise={standardise}&context={context}", patch_size=4, view=shown)
    got = features(x)
    assert got.shape == (2, 6, context * context * channels) and features.dim == got.shape[2]
    margin = (context - 4) // 2
    for b in range(2):
        pixels = (x[b].numpy() - np.array(shown.mean)[:, None, None]) / np.array(shown.std)[:, None, None]
        padded = np.pad(pixels, ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
        for n in range(6):
            top, left = 4 * (n // 3), 4 * (n % 3)
            window = padded[:, top : top + context, left : left + context].transpose(1, 2, 0).reshape(-1)
            if standardise:
                window = (window - window.mean()) / np.sqrt(window.var() + 1e-6)
            np.testing.assert_allclose(got[b, n].numpy(), window, atol=1e-4)


def test_standardised_patches_forget_brightness_and_contrast() -> None:
    features = make_features("pixel?standardise=true", patch_size=4, view=view(channels=1))
    x = images(channels=1)
    torch.testing.assert_close(features(x), features(0.5 * x + 0.2), atol=1e-3, rtol=1e-3)
    assert torch.isfinite(features(torch.full((1, 1, 8, 12), 0.5))).all()  # no variance, no NaN


def test_grid_of_rectangular_images() -> None:
    assert make_features("pixel", patch_size=4, view=view()).grid(8, 12) == (2, 3)


def test_features_already_made_are_returned_or_refused() -> None:
    made = make_features("pixel", patch_size=4, view=view())
    assert make_features(made, patch_size=4, view=view()) is made
    with pytest.raises(InputError, match="side 4"):
        make_features(made, patch_size=2, view=view())


def test_a_spec_taken_apart() -> None:
    (first, second), tail = parse_spec("pixel?context=6+backbone:resnet18@weights/a%2Bb.pth?layer=2&size=64|pca=8")
    assert (first.name, first.argument, first.file, dict(first.options)) == ("pixel", None, None, {"context": "6"})
    assert (second.name, second.argument, second.file) == ("backbone", "resnet18", "weights/a+b.pth")
    assert second.integer("layer") == 2 and second.integer("size") == 64 and second.integer("none") is None
    assert tail is not None and tail.integer("pca") == 8 and parse_spec("pixel")[1] is None


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("pixle", "Did you mean 'pixel'"),
        ("pixel+bakbone:resnet18", "Did you mean 'backbone'"),
        ("pixel?contxt=6", "Did you mean 'context'"),
        ("pixel?context=big", "whole number"),
        ("pixel?standardise=perhaps", "true or false"),
        ("pixel?context", "key=value"),
        ("pixel?context=5", "context = 6, 8"),
        ("pixel?context=2", "context = 6, 8"),
        ("pixel?context=64", "at most 18"),
        ("pixel@file.pth", "no file"),
        ("", "no patch features called ''"),
    ],
)
def test_a_bad_spec_is_told(spec: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make_features(spec, patch_size=4, view=view())


def test_a_patch_side_that_does_not_divide_names_those_that_do() -> None:
    for call in (
        lambda: make_features("pixel", patch_size=5, view=view()),
        lambda: make_features("pixel", patch_size=4, view=view())(images(8, 10)),
        lambda: patchify(images(), 5),
    ):
        with pytest.raises(InputError, match=r"1, 2(, 4)?"):
            call()


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(InputError, match="--channels 3"):
        make_features("pixel", patch_size=4, view=view())(images(channels=1))
