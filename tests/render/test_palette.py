import numpy as np
import pytest

from clustermim.render.palette import SERIES, THEME, light, themed, token_colours


@pytest.mark.parametrize("k", [2, 10, 50, 200, 1000, 5000])
def test_every_token_has_a_colour_of_its_own(k: int) -> None:
    colours = token_colours(np.random.default_rng(0).permutation(k))
    assert colours.shape == (k, 3)
    assert len(np.unique(colours, axis=0)) == k


@pytest.mark.parametrize("k", [10, 50, 1000])
def test_black_digits_are_readable_on_every_token_colour(k: int) -> None:
    channel = token_colours(np.arange(k)) / 255
    linear = np.where(channel <= 0.04045, channel / 12.92, ((channel + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.asarray([0.2126, 0.7152, 0.0722])
    # 0.7: the darkest that a map makes a colour. 3:1 is WCAG's contrast for large text.
    assert ((luminance * 0.7**2.2 + 0.05) / 0.05).min() > 3


def test_few_tokens_get_colours_far_apart() -> None:
    colours = token_colours(np.arange(10)).astype(int)
    gaps = np.abs(colours[:, None] - colours[None]).sum(-1)[~np.eye(10, dtype=bool)]
    assert gaps.min() > 40


def test_theme_colours_can_be_told_apart_and_become_variables() -> None:
    assert len({value for value, _ in THEME.values()}) == len(THEME)
    assert themed(f"stroke: {light('ink')}") == f"stroke: var(--ink,{light('ink')})"
    assert set(SERIES) <= set(THEME)
