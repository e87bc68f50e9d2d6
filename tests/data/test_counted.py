"""Counted randomness: the same bits however the counters come, and numbers that look random."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clustermim.data.counted import Stream, counter_hash, permutation, uniform

WORDS = st.integers(-(2**63), 2**63 - 1)


def splitmix(seed, counters):
    """The same hash in Python's unbounded integers."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(z):
        z &= mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    state = mix(seed + golden)
    for counter in counters:
        state = mix(state + counter * golden)
    return state - 2**64 if state >= 2**63 else state


@settings(deadline=None, max_examples=50)
@given(WORDS, WORDS, WORDS)
def test_hash_is_the_same_bits_from_integers_and_tensors(seed, first, second):
    expected = splitmix(seed, [first, second])
    assert counter_hash(seed, first, second).item() == expected
    assert counter_hash(seed, torch.tensor(first), second).item() == expected
    assert counter_hash(seed, first, torch.tensor([second]))[0].item() == expected


def test_hash_broadcasts():
    table = counter_hash(3, torch.arange(4)[:, None], torch.arange(5))
    assert table.shape == (4, 5)
    assert table[2, 3] == counter_hash(3, 2, 3)


def test_hash_has_no_ties_in_the_last_counter():
    assert len(counter_hash(0, 1, torch.arange(200_000)).unique()) == 200_000


def test_uniform_is_uniform_and_streams_are_independent():
    index = torch.arange(100_000)
    one, other = uniform(0, Stream.CROP, 0, index), uniform(0, Stream.FLIP, 0, index)
    assert one.min() >= 0 and one.max() < 1
    for numbers in (one, other, uniform(1, Stream.CROP, 0, index), uniform(0, Stream.CROP, 1, index)):
        assert stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.02


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 500))
def test_permutation_is_one_and_repeats(seed, epoch, n):
    order = permutation(seed, epoch, n)
    assert order.sort().values.tolist() == list(range(n))
    assert torch.equal(order, permutation(seed, epoch, n))


def test_permutation_changes_with_epoch_and_seed():
    assert not torch.equal(permutation(0, 0, 100), permutation(0, 1, 100))
    assert not torch.equal(permutation(0, 0, 100), permutation(1, 0, 100))
