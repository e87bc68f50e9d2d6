"""How well a score ranks what training finds: Spearman's ρ and Kendall's τ with bootstrap intervals, and regret."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float64
from scipy import stats

REPLICATES = 1000
LEVEL = 0.95
FEWEST = 3
"""Cells: of two, every rank correlation is 1 or -1."""
FEWEST_RESAMPLED = 5
"""Cells: resamples of fewer hold too few orders for an interval to mean anything."""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Of a score with an accuracy, positive where the score foretold the right order."""

    cells: int
    spearman: float
    spearman_low: float | None
    spearman_high: float | None
    kendall: float
    kendall_low: float | None
    kendall_high: float | None


@dataclass(frozen=True, kw_only=True)
class Regret:
    """What picking by a score costs against knowing the best."""

    picked: str
    """Of equal scores the first by name; `points` is the mean over all of them."""
    best: str
    points: float
    """Percentage points of accuracy between the best and the picked."""
    random_points: float
    """The same for a target picked at random."""
    saved: float | None
    """Share of the training time of all candidates that is not spent; None where times are unknown."""


def correlate(
    scores: Mapping[str, float], accuracies: Mapping[str, Sequence[float]], *, higher: bool, seed: int = 0
) -> Correlation | None:
    """Rank correlation over cells, each with one accuracy a seed.

    Parameters
    ----------
    scores
        Cell -> score.
    accuracies
        Cell -> accuracy of each of its seeds; the point estimate uses their mean.
    higher
        Whether a higher score promises a higher accuracy; else its sign is turned.
    seed
        Of the bootstrap, which draws cells and, within each, seeds, with replacement.

    Returns
    -------
    Correlation or None
        None for fewer than three cells, or where all scores or all accuracies are equal. The interval is None for
        fewer than five cells, and where fewer than half of the resamples have an order at all.
    """
    names = [name for name in scores if accuracies.get(name)]
    if len(names) < FEWEST:
        return None
    x = np.array([scores[name] for name in names]) * (1.0 if higher else -1.0)
    y = np.array([float(np.mean(accuracies[name])) for name in names])
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(names), size=(REPLICATES, len(names)))
    # The copies of a cell in one resample have one accuracy: apart, they would spoil an order that is perfect.
    means = np.empty(drawn.shape)
    for place, name in enumerate(names):
        values = np.asarray(accuracies[name], dtype=np.float64)
        means[:, place] = values[rng.integers(len(values), size=(REPLICATES, len(values)))].mean(axis=1)
    ys = np.take_along_axis(means, drawn, axis=1)
    enough = len(names) >= FEWEST_RESAMPLED
    rho = _interval(spearman_rows(x[drawn], ys)) if enough else (None, None)
    tau = _interval(kendall_rows(x[drawn], ys)) if enough else (None, None)
    return Correlation(
        cells=len(names),
        spearman=float(stats.spearmanr(x, y).statistic),
        spearman_low=rho[0],
        spearman_high=rho[1],
        kendall=float(stats.kendalltau(x, y).statistic),
        kendall_low=tau[0],
        kendall_high=tau[1],
    )


def spearman_rows(x: Float64[np.ndarray, "b n"], y: Float64[np.ndarray, "b n"]) -> Float64[np.ndarray, " b"]:
    """Spearman's ρ of each pair of rows; NaN where a row has no order."""
    a, b = (stats.rankdata(values, axis=1) for values in (x, y))
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return found


def kendall_rows(x: Float64[np.ndarray, "b n"], y: Float64[np.ndarray, "b n"]) -> Float64[np.ndarray, " b"]:
    """Kendall's τ-b of each pair of rows; NaN where a row has no order."""
    a, b = (np.sign(values[:, :, None] - values[:, None, :]) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = (a * b).sum(axis=(1, 2)) / np.sqrt((a**2).sum(axis=(1, 2)) * (b**2).sum(axis=(1, 2)))
    return found


def regret(
    scores: Mapping[str, float],
    accuracies: Mapping[str, Sequence[float]],
    seconds: Mapping[str, float],
    *,
    higher: bool,
) -> Regret | None:
    """What is lost by training only the target that a score names, and what is saved.

    Parameters
    ----------
    scores, accuracies, higher
        As for `correlate`.
    seconds
        Cell -> time of its trainings.

    Returns
    -------
    Regret or None
        None for fewer than two cells.
    """
    names = sorted(name for name in scores if accuracies.get(name))
    if len(names) < 2:
        return None
    mean = {name: float(np.mean(accuracies[name])) for name in names}
    top = (max if higher else min)(scores[name] for name in names)
    tied = [name for name in names if scores[name] == top]
    best = max(names, key=lambda name: mean[name])
    saved = None
    if all(seconds.get(name) for name in names):
        total = sum(seconds[name] for name in names)
        saved = 1 - float(np.mean([seconds[name] for name in tied])) / total
    return Regret(
        picked=tied[0],
        best=best,
        points=100 * (mean[best] - float(np.mean([mean[name] for name in tied]))),
        random_points=100 * (mean[best] - float(np.mean(list(mean.values())))),
        saved=saved,
    )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of paired differences, in percentage points."""

    points: float
    low: float | None
    """Of the 95 % interval (Student's t over the pairs); None for a single pair."""
    high: float | None
    pairs: int


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours less theirs over the seeds that both have; None where there is none.

    Parameters
    ----------
    ours, theirs
        Seed -> accuracy in [0, 1].
    """
    gaps = 100 * np.array([ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))])
    if not len(gaps):
        return None
    if len(gaps) == 1:
        return Difference(points=float(gaps[0]), low=None, high=None, pairs=1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps)))
    mean = float(gaps.mean())
    return Difference(points=mean, low=mean - half, high=mean + half, pairs=len(gaps))


def noise(accuracy: float, images: int) -> float:
    """Half width of the 95 % interval of a difference between two such accuracies on `images` test images.

    Normal approximation for two independent proportions. Both encoders see the same images, so the true width is
    mostly smaller: a difference within it should not be believed.

    Parameters
    ----------
    accuracy
        In [0, 1], about that of both.
    images
        Test images.
    """
    return float(stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt(2 * accuracy * (1 - accuracy) / images))


def foreseen_pairs(
    scores: Mapping[str, float], accuracies: Mapping[str, float], images: int | None, *, higher: bool
) -> tuple[int, int, int]:
    """How many pairs of cells that differ in their score came out in the order of the scores.

    Parameters
    ----------
    scores, higher
        As for `correlate`.
    accuracies
        Cell -> accuracy in [0, 1].
    images
        Test images: pairs within their noise are not counted either way; None counts all.

    Returns
    -------
    tuple[int, int, int]
        In the foreseen order, in the opposite one, too close to call.
    """
    right = wrong = close = 0
    for one, other in combinations([name for name in scores if name in accuracies], 2):
        if scores[one] == scores[other]:
            continue
        first, second = (one, other) if (scores[one] > scores[other]) == higher else (other, one)
        gap = accuracies[first] - accuracies[second]
        believed = 0.0 if images is None else noise((accuracies[first] + accuracies[second]) / 2, images)
        if abs(gap) <= believed:
            close += 1
        elif gap > 0:
            right += 1
        else:
            wrong += 1
    return right, wrong, close


def _interval(values: Float64[np.ndarray, " b"]) -> tuple[float | None, float | None]:
    known = values[~np.isnan(values)]
    if len(known) < len(values) / 2:
        return None, None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
