"""Rank correlations against scipy, and what holds of regret and paired differences whatever the figures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from clustermim.studies.correlating import correlate, kendall_rows, paired_difference, regret, spearman_rows

VALUES = st.lists(st.integers(0, 5), min_size=4, max_size=9)


@given(VALUES)
def test_rows_are_correlated_as_scipy_does_it(values: list[int]) -> None:
    x = np.array(values, dtype=float)
    y = np.array([(3 * v + i) % 7 for i, v in enumerate(values)], dtype=float)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(spearman_rows(x[None], y[None])[0])
        return
    assert spearman_rows(x[None], y[None])[0] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert kendall_rows(x[None], y[None])[0] == pytest.approx(stats.kendalltau(x, y).statistic)


def test_a_perfect_score_is_1_and_its_sign_follows_the_direction() -> None:
    scores = {str(i): float(i) for i in range(6)}
    accuracies = {str(i): [0.1 * i, 0.1 * i + 0.01] for i in range(6)}
    right = correlate(scores, accuracies, higher=True)
    wrong = correlate(scores, accuracies, higher=False)
    assert right is not None and wrong is not None
    assert (right.spearman, right.kendall, right.cells) == (pytest.approx(1), pytest.approx(1), 6)
    assert wrong.spearman == pytest.approx(-1)
    assert right.spearman_low is not None and right.spearman_low > 0.9


def test_noise_has_an_interval_that_holds_0() -> None:
    generator = np.random.default_rng(0)
    scores = {str(i): float(generator.normal()) for i in range(12)}
    found = correlate(scores, {name: [float(generator.normal())] for name in scores}, higher=True)
    assert found is not None and found.spearman_low is not None and found.spearman_high is not None
    assert found.spearman_low < 0 < found.spearman_high


def test_too_few_or_equal_cells_have_no_correlation() -> None:
    assert correlate({"a": 1.0, "b": 2.0}, {"a": [0.1], "b": [0.2]}, higher=True) is None
    assert correlate({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": [0.1], "b": [0.2], "c": [0.3]}, higher=True) is None
    few = correlate({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": [0.1], "b": [0.2], "c": [0.3]}, higher=True)
    assert few is not None and few.spearman_low is None


def test_spread_of_seeds_widens_the_interval() -> None:
    scores = {str(i): float(i) for i in range(8)}
    tight = correlate(scores, {n: [v / 10] * 3 for n, v in scores.items()}, higher=True)
    wide = correlate(scores, {n: [v / 10 - 0.6, v / 10, v / 10 + 0.6] for n, v in scores.items()}, higher=True)
    assert tight is not None and wide is not None and wide.spearman_low is not None and tight.spearman_low is not None
    assert wide.spearman == pytest.approx(tight.spearman)
    assert wide.spearman_low < tight.spearman_low


def test_regret_is_0_for_the_best_and_the_mean_over_ties() -> None:
    accuracies = {"a": [0.5], "b": [0.7], "c": [0.6]}
    seconds = {"a": 10.0, "b": 20.0, "c": 10.0}
    best = regret({"a": 1.0, "b": 3.0, "c": 2.0}, accuracies, seconds, higher=True)
    assert best is not None
    assert (best.picked, best.best, best.points, best.saved) == ("b", "b", 0, 0.5)
    assert best.random_points == pytest.approx(10)
    tied = regret({"a": 1.0, "b": 3.0, "c": 1.0}, accuracies, seconds, higher=False)
    assert tied is not None
    assert tied.points == pytest.approx(100 * (0.7 - 0.55))
    assert tied.saved == pytest.approx(0.75)
    assert regret({"a": 1.0}, accuracies, seconds, higher=True) is None


def test_paired_differences_use_only_shared_seeds_and_scipys_interval() -> None:
    ours, theirs = {0: 0.5, 1: 0.52, 2: 0.58, 7: 0.9}, {0: 0.4, 1: 0.45, 2: 0.44}
    found = paired_difference(ours, theirs)
    assert found is not None
    gaps = [10.0, 7.0, 14.0]
    low, high = stats.t.interval(0.95, 2, np.mean(gaps), stats.sem(gaps))
    assert (found.points, found.pairs) == (pytest.approx(np.mean(gaps)), 3)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    single = paired_difference({1: 0.5}, {1: 0.4})
    assert single is not None and single.low is None
    assert paired_difference({1: 0.5}, {2: 0.4}) is None
