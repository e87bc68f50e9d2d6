"""Presets: what timm builds from them, the fixed positions, the decoders."""

import json

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.encoders.presets import (
    PRESETS,
    decoder_defaults,
    default_patch_size,
    model_kwargs,
    sincos_positions,
)
from clustermim.errors import InputError


@pytest.mark.parametrize("model", ["vit_micro", "vit_ti", "vit_small"])
@pytest.mark.parametrize(("size", "patch", "channels"), [((8, 8), 2, 1), ((16, 24), 4, 5)])
def test_timm_builds_a_preset_from_json(model: str, size: tuple[int, int], patch: int, channels: int) -> None:
    name, kwargs = json.loads(json.dumps(model_kwargs(model, size, patch, channels)))
    with torch.device("meta"):
        built = timm.create_model(name, **kwargs, num_classes=0)
    tokens = 1 + (size[0] // patch) * (size[1] // patch)
    assert built.pos_embed.shape == (1, tokens, built.embed_dim)
    assert built.patch_embed.proj.weight.shape == (built.embed_dim, channels, patch, patch)
    assert sincos_positions(built.patch_embed.grid_size, built.embed_dim).shape == built.pos_embed.shape


def test_decoders_are_those_of_the_design() -> None:
    assert decoder_defaults("vit_s") == {"dim": 256, "depth": 8, "heads": 8}
    assert decoder_defaults("vit_b") == decoder_defaults("vit_large") == {"dim": 512, "depth": 8, "heads": 16}
    assert decoder_defaults("vit_small_patch32_224") == decoder_defaults("vit_s")
    for name, preset in PRESETS.items():
        decoder = decoder_defaults(name)
        assert decoder["dim"] % decoder["heads"] == 0 and preset.dim % preset.heads == 0
        assert decoder["dim"] < preset.dim


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6).map(lambda n: 4 * n))
def test_positions_equal_a_naive_loop(rows: int, columns: int, dim: int) -> None:
    import math

    positions = sincos_positions((rows, columns), dim, cls=False)
    assert positions.shape == (1, rows * columns, dim)
    quarter = dim // 4
    for row in range(rows):
        for column in range(columns):
            expected = []
            for coordinate in (column, row):
                angles = [coordinate / 10_000 ** (i / quarter) for i in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(positions[0, row * columns + column], torch.tensor(expected))


def test_class_token_has_position_zero_and_patches_differ() -> None:
    positions = sincos_positions((3, 5), 32)[0]
    assert positions.shape == (16, 32) and not positions[0].any()
    assert torch.cdist(positions[1:], positions[1:]).fill_diagonal_(1).min() > 0.1


@pytest.mark.parametrize(("size", "patch"), [((8, 8), 2), ((32, 32), 4), ((224, 224), 16), ((96, 160), 8), ((7, 7), 1)])
def test_default_patch_side_divides(size: tuple[int, int], patch: int) -> None:
    found = default_patch_size(size)
    assert size[0] % found == 0 and size[1] % found == 0
    assert found == patch or size == (96, 160)


def test_bad_requests_name_the_way_out() -> None:
    with pytest.raises(InputError, match="Did you mean 'vit_micro'"):
        model_kwargs("vit_mircro", 32, 4, 3)
    with pytest.raises(InputError, match="Did you mean 'vit_s"):
        decoder_defaults("vit_smal")
    with pytest.raises(InputError, match="1, 2, 4, 8"):
        model_kwargs("vit_micro", (8, 16), 3, 1)
    with pytest.raises(InputError, match="ResNet"):
        model_kwargs("resnet10t", 32, 4, 3)
    with pytest.raises(InputError, match="class token"):
        model_kwargs("vit_small_patch14_reg4_dinov2", 28, 14, 3)
    with pytest.raises(InputError, match="divisible by 4"):
        sincos_positions((2, 2), 6)
