"""Folds hold every class, keep groups whole, and refuse labels that cannot be scored."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.errors import InputError
from clustermim.scoring.counts import TokenCounts
from clustermim.scoring.folds import plan_images
from clustermim.scoring.intervals import resamples
from clustermim.scoring.tcas import score_counts, score_tokens

quick = settings(deadline=None, max_examples=30)


def cells_of(plan):
    return plan.folds * plan.num_classes + plan.labels


@quick
@given(st.lists(st.integers(2, 12), min_size=2, max_size=5), st.integers(0, 99))
def test_folds_are_stratified(sizes, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    plan = plan_images(labels, seed=seed)
    assert plan.num_folds == min(5, min(sizes))
    counts = np.array(
        [[(cells_of(plan) == f * len(sizes) + c).sum() for c in range(len(sizes))] for f in range(plan.num_folds)]
    )
    assert counts.min() >= 1 and np.ptp(counts, axis=0).max() <= 1
    assert np.ptp(counts.sum(axis=1)) <= 1


@quick
@given(st.lists(st.integers(2, 6), min_size=2, max_size=4), st.integers(0, 99), st.booleans())
def test_groups_stay_whole_and_pure_groups_reach_every_fold(groups_per_class, seed, mixed):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(groups_per_class)), groups_per_class)
    groups = np.arange(len(labels))
    repeat = rng.integers(1, 6, len(labels))
    labels, groups = np.repeat(labels, repeat), np.repeat(groups, repeat)
    if mixed:
        labels = np.concatenate([labels, rng.integers(0, len(groups_per_class), 3)])
        groups = np.concatenate([groups, rng.integers(0, groups.max() + 1, 3)])
    plan = plan_images(labels, groups=groups)
    for group in np.unique(groups):
        assert len(set(plan.folds[groups == group])) == 1
    if not mixed:
        assert plan.num_folds == min(5, min(groups_per_class))
        assert len(np.unique(cells_of(plan))) == plan.num_folds * len(groups_per_class)


@quick
@given(st.integers(0, 99))
def test_resamples_stay_inside_fold_and_class_and_keep_groups_together(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 60)
    labels[:9] = np.arange(9) % 3
    plan = plan_images(labels)
    weights = np.concatenate(list(resamples(plan, 7, seed, block=3)))
    assert weights.shape == (7, 60)
    for cell in np.unique(cells_of(plan)):
        inside = cells_of(plan) == cell
        assert (weights[:, inside].sum(axis=1) == inside.sum()).all()
    np.testing.assert_array_equal(weights, np.concatenate(list(resamples(plan, 7, seed, block=100))))
    groups = np.arange(60) // 3
    weights = next(resamples(plan_images(labels, groups=groups), 5, seed, block=5))
    assert all((weights[:, groups == g].max(axis=1) == weights[:, groups == g].min(axis=1)).all() for g in range(20))


def test_mean_resample_is_the_sample():
    plan = plan_images(np.arange(40) % 2)
    weights = next(resamples(plan, 4000, 0, block=4000))
    assert np.abs(weights.mean(axis=0) - 1).max() < 0.1


def test_a_class_with_a_single_group_is_plug_in_only_and_told():
    score = score_tokens(np.zeros((6, 2), dtype=np.int64), [0, 0, 0, 1, 1, 1], groups=[0, 1, 2, 3, 3, 3])
    assert score.folds == 0 and "Class 1 has a single group" in score.notes[0]


def test_thin_folds_are_told_when_intervals_are_asked_for():
    ids, labels = np.arange(40).reshape(10, 4) % 3, np.arange(10) % 2
    assert not score_tokens(ids, labels).notes
    assert "single image" in score_tokens(ids, labels, bootstrap=5).notes[0]


GOOD_IDS, GOOD_LABELS = np.zeros((4, 3), dtype=np.int64), [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("ids", "labels", "options", "message"),
    [
        (GOOD_IDS + 5, GOOD_LABELS, {"vocab_size": 5}, r"token 5, outside \[0, 5\)"),
        (GOOD_IDS - 1, GOOD_LABELS, {"vocab_size": 5}, r"token -1, outside \[0, 5\)"),
        (GOOD_IDS, [0, -1, 0, 1], {}, "negative values"),
        (GOOD_IDS, [0, 1, 0], {}, "4 images but labels has 3"),
        (GOOD_IDS, [2, 2, 2, 2], {}, "All 4 images have class 2"),
        (GOOD_IDS, [0, 1, 0, 3], {"num_classes": 3}, "class 3, but num_classes is 3"),
        (GOOD_IDS, [0.0, 1.0, float("nan"), 1.0], {}, "labels holds NaN"),
        (GOOD_IDS * np.nan, GOOD_LABELS, {}, "ids holds NaN"),
        (GOOD_IDS + 0.5, GOOD_LABELS, {}, "fractions"),
        (torch.zeros(4, 3) + torch.inf, GOOD_LABELS, {}, "NaN or infinite"),
        (GOOD_IDS[:, 0], GOOD_LABELS, {}, "shape"),
        (GOOD_IDS[:, :0], GOOD_LABELS, {}, "shape"),
        ([[1, 2], [3]], [0, 1], {}, "differ in length"),
        (GOOD_IDS, ["a", "b", "a", "b"], {}, "array of integers"),
        (GOOD_IDS, np.zeros((4, 1, 1), dtype=int), {}, "one class per image"),
        (GOOD_IDS, [[0, 1], [0, 1], [1, 1], [0, 0]], {}, "labels for 2 patches of each image, but 3 tokens"),
        (GOOD_IDS, [[0, 1, -2], [0, 1, 1], [1, 1, 1], [0, 0, 0]], {}, "negative values"),
        (GOOD_IDS, np.full((4, 3), -1), {}, "no class"),
        (GOOD_IDS, np.zeros((4, 3), dtype=bool), {}, "belongs to no class"),
        (GOOD_IDS, np.eye(4, dtype=bool)[[0, 0, 0, 0]], {}, "All 4 images have class 0"),
        (GOOD_IDS[:0], np.empty(0, dtype=np.int64), {}, "no labelled images"),
        (GOOD_IDS, GOOD_LABELS, {"groups": [0, 1]}, "groups must have one value per image"),
        (GOOD_IDS, GOOD_LABELS, {"groups": [0, 1, np.nan, 2]}, "groups holds NaN"),
        (GOOD_IDS, GOOD_LABELS, {"bootstrap": -1}, "bootstrap must be"),
        (GOOD_IDS, GOOD_LABELS, {"bootstrap": 1}, "bootstrap must be"),
        (GOOD_IDS, GOOD_LABELS, {"seed": -1}, "seed"),
        (GOOD_IDS, GOOD_LABELS, {"vocab_size": 0}, "vocab_size"),
    ],
)
def test_bad_input_is_refused_in_words(ids, labels, options, message):
    with pytest.raises(InputError, match=message):
        score_tokens(ids, labels, **options)


def test_a_stream_that_does_not_match_its_plan_is_refused():
    plan = plan_images(GOOD_LABELS)
    ids, labels, index = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]), torch.tensor([0, 1])
    counts = TokenCounts(plan, 4)
    counts.update(ids, labels, index)
    for bad, message in [
        ((ids, labels, index), "counted twice"),
        ((ids, labels.flip(0), index + 2), "differ"),
        ((ids, labels, index + 3), "4 labelled images"),
        ((ids, labels, index - 1), "image -1"),
        ((ids, labels, torch.tensor([2, 2])), "counted twice"),
    ]:
        with pytest.raises(InputError, match=message):
            counts.update(*bad)
    with pytest.raises(InputError, match="2 of 4 labelled images have no tokens"):
        counts.rows()
    counts.update(ids, None, index + 2)
    assert score_counts(counts).images == 4
    with pytest.raises(InputError, match="per_image=True"):
        score_counts(counts, bootstrap=5)
