"""How far a figure would move on other images: a bootstrap of images within fold × class.

Images (or groups) are drawn with replacement inside their own fold and class, never across folds: a copy of one
image on both sides of a cross-fit would let its tokens recognise themselves and raise the score. Replicate b of seed
s is a function of (s, b) alone, so two tokenizers scored on the same images meet the same resamples.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float64

from clustermim.scoring.counts import RowCounts
from clustermim.scoring.figures import BOUNDS, figures
from clustermim.scoring.folds import ImagePlan
from clustermim.scoring.sums import BLOCK, TokenSummer

LEVEL = 0.95
MOST_AT_ONCE = 64


def resamples(plan: ImagePlan, replicates: int, seed: int, block: int) -> Iterator[Float64[np.ndarray, "b images"]]:
    """How often each image is drawn in each replicate, `block` replicates at a time."""
    order = np.argsort(plan.strata, kind="stable")
    sizes = np.unique(plan.strata, return_counts=True)[1]
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    size = np.repeat(sizes, sizes)
    for first in range(0, replicates, block):
        width = min(block, replicates - first)
        weights = np.empty((width, plan.num_images))
        for row in range(width):
            drawn = np.random.default_rng([seed, 2, first + row]).random(len(order))
            times = np.bincount(start + (drawn * size).astype(np.int64), minlength=len(order))
            unit_weights = np.empty(len(order))
            unit_weights[order] = times
            weights[row] = unit_weights[plan.units]
        yield weights


def bootstrap_figures(
    counts: RowCounts, plan: ImagePlan, replicates: int, seed: int
) -> dict[str, Float64[np.ndarray, " replicates"]]:
    """Every figure in every replicate.

    Parameters
    ----------
    counts
        Counts of each image (`TokenCounts(..., per_image=True).rows()`), one row per image of the plan.
    plan
        The plan that the images were counted under.
    replicates
        Number of resamples.
    seed
        Seed of the resamples.
    """
    summer = TokenSummer(counts)
    classes, folds = counts.num_classes, max(1, counts.num_folds)
    block = int(np.clip(BLOCK // (classes * max(folds * 16, folds * classes)), 1, MOST_AT_ONCE))
    parts = [figures(summer.sums(weights)) for weights in resamples(plan, replicates, seed, block)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def basic_intervals(
    values: Mapping[str, float],
    replicates: Mapping[str, Float64[np.ndarray, " b"]],
    *,
    vocab_size: float = np.inf,
    level: float = LEVEL,
) -> dict[str, tuple[float, float]]:
    """Basic bootstrap intervals [2θ − q_high, 2θ − q_low] of each figure, cut to the range it can take.

    A percentile interval would carry the bias of the estimate twice: a resample holds fewer distinct images, so
    plug-in figures rise and cross-fitted ones fall in it. The basic interval takes that shift out instead
    (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 5.2).

    Parameters
    ----------
    values
        Estimates by name.
    replicates
        Their values in each resample; NaN where a resample lost a class.
    vocab_size
        K, which perplexity and used tokens cannot exceed.
    level
        Coverage aimed at.
    """
    tail = (1 - level) / 2
    bounds = BOUNDS | {"perplexity": (1.0, vocab_size), "used_tokens": (1.0, vocab_size)}
    out: dict[str, tuple[float, float]] = {}
    for name, value in values.items():
        spread = replicates[name][np.isfinite(replicates[name])]
        if not len(spread):
            continue
        low, high = np.quantile(spread, [tail, 1 - tail])
        least, most = bounds.get(name, (0.0, np.inf))
        out[name] = (float(np.clip(2 * value - high, least, most)), float(np.clip(2 * value - low, least, most)))
    return out
