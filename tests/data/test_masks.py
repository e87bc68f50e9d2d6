"""Masks hide exactly what they say, everywhere alike, and depend on (seed, epoch, index) alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clustermim.data.masks import block_masks, hidden_count, part_of_masks, random_masks
from clustermim.errors import InputError


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 80), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_random_masks_hide_exactly_the_count(patches, ratio, seed):
    if not 1 <= round(patches * ratio) < patches:
        with pytest.raises(InputError):
            hidden_count(patches, ratio)
        return
    mask = random_masks(seed, 3, torch.arange(7), patches, ratio)
    assert mask.sum(1).tolist() == [hidden_count(patches, ratio)] * 7


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(2, 12), st.floats(0.1, 0.9), st.integers(0, 1000))
def test_block_masks_hide_exactly_the_count(rows, columns, ratio, seed):
    if not 1 <= round(rows * columns * ratio) < rows * columns:
        return
    mask = block_masks(seed, 0, torch.arange(9), (rows, columns), ratio)
    assert mask.shape == (9, rows * columns)
    assert mask.sum(1).tolist() == [hidden_count(rows * columns, ratio)] * 9


@given(st.integers(2, 60), st.floats(0.05, 0.95), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_part_of_masks_is_a_part_of_the_count(patches, ratio, seed):
    if not 1 <= round(patches * ratio) < patches:
        return
    index = torch.arange(5)
    mask = random_masks(seed, 1, index, patches, ratio)
    for count in (1, int(mask[0].sum())):
        part = part_of_masks(seed, 1, index, mask, count)
        assert part.sum(1).tolist() == [count] * 5
        assert not bool((part & ~mask).any())
    assert torch.equal(part, mask)


def test_part_of_masks_asks_for_each_hidden_patch_alike():
    index = torch.arange(4000)
    mask = random_masks(0, 0, index, 8, 0.5)
    part = part_of_masks(0, 0, index, mask, 2)
    share = part.sum(0) / mask.sum(0)
    assert bool(((share - 0.5).abs() < 0.05).all())


@pytest.mark.parametrize("epoch", [0, 7])
def test_random_masks_are_uniform_over_positions(epoch):
    images, patches, ratio = 20_000, 16, 0.75
    mask = random_masks(0, epoch, torch.arange(images), patches, ratio)
    hidden = mask.sum(0).double().numpy()
    # Hidden counts of a position are binomial, negatively tied by the fixed row sum: chi-square of N - 1.
    statistic = ((hidden - images * ratio) ** 2 / (images * ratio * (1 - ratio))).sum() * (patches - 1) / patches
    assert stats.chi2(patches - 1).sf(statistic) > 1e-4
    pairs = (mask[:, 0] & mask[:, 1]).double().mean()
    assert abs(pairs - 12 * 11 / (16 * 15)) < 0.015


def test_masks_do_not_depend_on_the_batch():
    whole = random_masks(5, 2, torch.arange(20), 49, 0.6)
    assert torch.equal(whole[[13, 4]], random_masks(5, 2, torch.tensor([13, 4]), 49, 0.6))
    whole = block_masks(5, 2, torch.arange(20), (7, 7), 0.4)
    assert torch.equal(whole[[13, 4]], block_masks(5, 2, torch.tensor([13, 4]), (7, 7), 0.4))
    assert not torch.equal(whole, block_masks(5, 3, torch.arange(20), (7, 7), 0.4))


def test_block_masks_are_blocky():
    """Hidden patches have more hidden neighbours to their right than in random masks."""

    def together(mask):
        grid = mask.view(-1, 14, 14).double()
        return (grid[:, :, 1:] * grid[:, :, :-1]).sum().item()

    index = torch.arange(200)
    assert together(block_masks(0, 0, index, (14, 14), 0.4)) > 1.5 * together(random_masks(0, 0, index, 196, 0.4))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_ratio_must_leave_something_hidden_and_something_visible(ratio):
    with pytest.raises(InputError, match=r"at least one must be hidden and one visible"):
        hidden_count(16, ratio)


def test_usual_counts():
    assert hidden_count(196, 0.75) == 147
    assert hidden_count(4, 0.75) == 3
