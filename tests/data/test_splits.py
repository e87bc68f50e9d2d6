"""Hold-outs are stratified, disjoint, stable, and keep groups whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.data.splits import hold_out, take
from clustermim.errors import InputError

LABELS = st.lists(st.integers(0, 4), min_size=5, max_size=120).map(np.array)


@settings(deadline=None, max_examples=25)
@given(LABELS, st.floats(0.05, 0.9), st.integers(0, 99))
def test_every_class_gives_its_share(labels, fraction, seed):
    test = hold_out(labels, fraction, seed)
    assert np.array_equal(test, hold_out(labels, fraction, seed))
    for value, count in zip(*np.unique(labels, return_counts=True), strict=True):
        held = int(test[labels == value].sum())
        assert held == min(max(round(count * fraction), 1), count - 1)


def test_the_seed_changes_the_choice():
    labels = np.arange(100) % 4
    assert not np.array_equal(hold_out(labels, 0.2, 0), hold_out(labels, 0.2, 1))


@settings(deadline=None, max_examples=25)
@given(LABELS, st.integers(2, 20), st.integers(0, 99))
def test_groups_stay_whole(labels, count, seed):
    groups = np.arange(len(labels)) % count
    test = hold_out(labels, 0.2, seed, groups)
    assert test.any() and not test.all()
    assert not set(groups[test]) & set(groups[~test])


def test_groups_are_stratified_where_they_can_be():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), 5)
    labels = np.where(generator.random(1000) < 0.3, 1, 0)
    test = hold_out(labels, 0.2, 0, groups)
    for value in (0, 1):
        assert abs(test[labels == value].mean() - 0.2) < 0.03


def test_one_group_cannot_be_split():
    with pytest.raises(InputError, match=r"one group"):
        hold_out(np.arange(10) % 2, 0.2, 0, np.zeros(10))


@settings(deadline=None, max_examples=25)
@given(LABELS, st.integers(1, 130), st.integers(0, 99))
def test_a_limit_keeps_the_classes(labels, limit, seed):
    rows = np.arange(len(labels)) * 3
    kept = take(rows, labels, limit, seed)
    assert len(kept) == min(limit, len(rows)) and set(kept) <= set(rows) and (np.diff(kept) > 0).all()
    if limit >= len(set(labels)):
        assert set(labels[kept // 3]) == set(labels)
    for value, count in zip(*np.unique(labels, return_counts=True), strict=True):
        assert abs((labels[kept // 3] == value).sum() - len(kept) * count / len(labels)) <= len(set(labels))
    assert len(take(rows, None, limit, seed)) == min(limit, len(rows))
