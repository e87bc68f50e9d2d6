"""How far a figure would move on other images: a bootstrap of images within fold × class.

Images (or groups) are drawn with replacement inside their own fold and class, never across folds: a copy of one
image on both sides of a cross-fit would let its tokens recognise themselves and raise the score. Replicate b of seed
s is a function of (s, b) alone, so two tokenizers scored on the same images meet the same resamples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from clustermim.scoring.counts import RowCounts
from clustermim.scoring.figures import BOUNDS, figures
from clustermim.scoring.folds import ImagePlan
from clustermim.scoring.sums import BLOCK, TokenSummer

LEVEL = 0.95
MOST_AT_ONCE = 64
# Half steps are needed for one number, a ratio of variances; fewer than these tell nothing, more tell no more.
FEWEST, MOST_HALF = 20, 200
TINY = 1e-12


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


@dataclass(frozen=True, kw_only=True)
class Replicates:
    """Every figure in every resample of the images."""

    full: Mapping[str, Float64[np.ndarray, " b"]]
    """Images weighted by how often they were drawn; NaN where a resample lost a class."""
    half: Mapping[str, Float64[np.ndarray, " h"]]
    """The first resamples again, with weights half way to 1, by which `spread` knows the excess of the full ones."""
    widen: float = 1.0
    """What the spread is to be multiplied with because resamples of few units vary too little."""


def bootstrap_figures(counts: RowCounts, plan: ImagePlan, replicates: int, seed: int) -> Replicates:
    """Every figure in every replicate.

    Parameters
    ----------
    counts
        Counts of each image (`TokenCounts(..., per_image=True).rows()`).
    plan
        The plan that the images were counted under.
    replicates
        Number of resamples.
    seed
        Seed of the resamples.
    """
    summer = TokenSummer(counts)
    images = np.arange(plan.num_images) if counts.row_image is None else counts.row_image
    classes, folds = counts.num_classes, max(1, counts.num_folds)
    block = int(np.clip(BLOCK // (classes * max(folds * 16, folds * classes)), 1, MOST_AT_ONCE))
    full, half = [], []
    done = 0
    for drawn in resamples(plan, replicates, seed, block):
        weights = drawn[:, images]
        full.append(figures(summer.sums(weights)))
        if done < MOST_HALF:
            half.append(figures(summer.sums((1.0 + weights[: MOST_HALF - done]) / 2)))
        done += len(weights)
    return Replicates(full=_joined(full), half=_joined(half), widen=widening(plan))


def widening(plan: ImagePlan) -> float:
    """√(n/(n − strata)), at most 2: m units drawn from m vary by (m − 1)/m of what m new ones would."""
    units, strata = len(plan.strata), len(np.unique(plan.strata))
    return float(np.sqrt(min(4.0, units / max(1, units - strata))))


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def spread(
    value: float, full: Float64[np.ndarray, " b"], half: Float64[np.ndarray, " h"] | None, widen: float = 1.0
) -> Float64[np.ndarray, " b"]:
    """Replicates of the true value: resamples mirrored at the estimate, their excess spread taken out.

    A basic interval is made of 2θ − θ*, which also takes out the bias that resampling shows: fewer distinct images
    raise plug-in figures and lower cross-fitted ones (Davison and Hinkley, Bootstrap Methods and their Application,
    1997, section 5.2). But a figure that pairs images with images, as every class walk does, has a part that a
    resample spreads three times too wide in variance, since there both images of a pair are drawn anew: with weights
    1 + s·e, that part has (2 + s²) times its variance and the rest once. Full and half steps (s = 1, ½) tell the two
    apart (docs/theory.md), and the replicates are drawn together round their mean until the excess is gone.

    Parameters
    ----------
    value
        The estimate θ.
    full, half
        Its values under full and half steps, without NaN; half None (or too few) for no correction.
    widen
        See `widening`.
    """
    centre = full.mean()
    ratio = widen
    if half is not None and len(half) >= FEWEST and full.std() > TINY:
        own = full[: len(half)]
        whole, part = own.var(), 4 * half.var()
        if whole > 0:
            pairs = np.clip((whole - part) / 0.75, 0.0, whole / 3)
            ratio = widen * float(np.sqrt(1.0 - 2 * pairs / whole))
    return np.asarray(2 * value - centre - ratio * (full - centre))


def basic_intervals(
    values: Mapping[str, float], replicates: Replicates, *, vocab_size: float = np.inf, level: float = LEVEL
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of each figure (see `spread`), cut to the range it can take.

    Parameters
    ----------
    values
        Estimates by name.
    replicates
        Their values in each resample.
    vocab_size
        K, which perplexity and used tokens cannot exceed.
    level
        Coverage aimed at.
    """
    tail = (1 - level) / 2
    bounds = BOUNDS | {"perplexity": (1.0, vocab_size), "used_tokens": (1.0, vocab_size)}
    out: dict[str, tuple[float, float]] = {}
    for name, value in values.items():
        full, half = finite(replicates, name)
        if not len(full):
            continue
        # The number of used tokens is no smooth function of the weights: half a step loses none.
        ends = np.quantile(
            spread(value, full, None if name == "used_tokens" else half, replicates.widen), [tail, 1 - tail]
        )
        low, high = np.clip(ends, *bounds.get(name, (0.0, np.inf)))
        out[name] = (float(low), float(high))
    return out


def finite(replicates: Replicates, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Full and half replicates of a figure without those that lost a class; no half ones where they do not pair."""
    full, half = replicates.full[name], replicates.half[name]
    kept = np.isfinite(full)
    return full[kept], half if bool(kept.all()) else None
