"""How far a figure would move on other images: a bootstrap of images within fold × class.

Images (or groups) are drawn with replacement inside their own fold and class, never across folds: a copy of one
image on both sides of a cross-fit would let its tokens recognise themselves and raise the score. Replicate b of seed
s is a function of (s, b) alone, so two tokenizers scored on the same images meet the same resamples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64

from clustermim.scoring.counts import RowCounts
from clustermim.scoring.figures import BOUNDS, figures
from clustermim.scoring.folds import ImagePlan
from clustermim.scoring.sums import BLOCK, TokenSummer

Evaluate: TypeAlias = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Weights of the rows, (b, rows), to figures, (b,) each."""

LEVEL = 0.95
MOST_AT_ONCE = 64
STEP = 0.125
"""Small steps have weights 1 + STEP·(w − 1), where a resample has weights w."""
# Small steps are needed for one number, a ratio of variances; fewer than these tell nothing, more tell no more.
FEWEST, MOST_SMALL = 18, 120
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
    small: Mapping[str, Float64[np.ndarray, " h"]]
    """The first resamples again, in small steps from the sample: the figure's move, divided by the step."""
    mixed: Mapping[str, Float64[np.ndarray, " m"]]
    """What two small steps together do beyond the sum of either: a mixed second difference over √2·STEP². Its square is
    on average the variance that is due to pairs of images, with three times that of triples."""
    triple: Mapping[str, Float64[np.ndarray, " t"]]
    """What three do beyond any two: a mixed third difference over √6·STEP³, whose square is the variance of triples."""
    widen: float = 1.0
    """What the spread is to be multiplied with because resamples of few units vary too little."""

    def minus(self, other: "Replicates", name: str) -> "Replicates":
        """One figure's difference to that of other tokens under the same resamples."""
        return Replicates(
            full={name: self.full[name] - other.full[name]},
            small={name: self.small[name] - other.small[name]},
            mixed={name: self.mixed[name] - other.mixed[name]},
            triple={name: self.triple[name] - other.triple[name]},
            widen=self.widen,
        )


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
    block = int(np.clip(BLOCK // (classes * max(folds * 16, folds * classes)), 3, MOST_AT_ONCE))
    block -= block % 3  # three resamples at a time make the mixed differences
    here = figures(summer.sums(np.ones((1, len(images)))))
    full: list[dict[str, np.ndarray]] = []
    small, mixed, triple = list(full), list(full), list(full)
    done = 0
    for drawn in resamples(plan, replicates, seed, block):
        weights = drawn[:, images]
        full.append(figures(summer.sums(weights)))
        threes = min(len(weights), MOST_SMALL - done) // 3
        done += len(weights)
        if threes > 0:
            moves = _small_moves(lambda w: figures(summer.sums(w)), STEP * (weights[: 3 * threes] - 1.0), here)
            for held, found in zip((small, mixed, triple), moves, strict=True):
                held.append(found)
    none = {name: np.empty(0) for name in here}
    return Replicates(
        full=_joined(full),
        small=_joined(small) if small else none,
        mixed=_joined(mixed) if mixed else none,
        triple=_joined(triple) if triple else none,
        widen=widening(plan),
    )


def _small_moves(
    evaluate: Evaluate, steps: Float64[np.ndarray, "b rows"], here: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`small`, `mixed` and `triple` of `Replicates`, from three resamples at a time."""
    a, b, c = steps[::3], steps[1::3], steps[2::3]
    alone = [evaluate(1.0 + step) for step in (a, b, c)]
    twos = [evaluate(1.0 + step) for step in (a + b, a + c, b + c)]
    threes = evaluate(1.0 + a + b + c)
    small, mixed, triple = {}, {}, {}
    for name, value in here.items():
        one = [found[name] for found in alone]
        two = [found[name] for found in twos]
        small[name] = np.concatenate([move - value for move in one]) / STEP
        pairs = [two[n] - one[i] - one[j] + value for n, (i, j) in enumerate(((0, 1), (0, 2), (1, 2)))]
        mixed[name] = np.concatenate(pairs) / (np.sqrt(2.0) * STEP**2)
        triple[name] = (threes[name] - sum(two) + sum(one) - value) / (np.sqrt(6.0) * STEP**3)
    return small, mixed, triple


def widening(plan: ImagePlan) -> float:
    """√(n/(n − strata)), at most 2: m units drawn from m vary by (m − 1)/m of what m new ones would."""
    units, strata = len(plan.strata), len(np.unique(plan.strata))
    return float(np.sqrt(min(4.0, units / max(1, units - strata))))


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def spread(value: float, replicates: Replicates, name: str) -> Float64[np.ndarray, " b"]:
    """Replicates of the true value: resamples mirrored at the estimate, their excess spread taken out.

    A basic interval is made of 2θ − θ*, which also takes out the bias that resampling shows: fewer distinct images
    raise plug-in figures and lower cross-fitted ones (Davison and Hinkley, Bootstrap Methods and their Application,
    1997, section 5.2). But a figure that pairs images with images, as every class walk does, has a part that a
    resample spreads three times too wide in variance, since there both images of a pair are drawn anew; a small step
    spreads it twice too wide, as the jackknife does (Efron and Stein, The jackknife estimate of variance, Annals of
    Statistics 1981). How much is due to pairs, and to triples, mixed differences of small steps tell, and the
    replicates are drawn together round their mean until the excess is gone (docs/theory.md).

    Parameters
    ----------
    value
        The estimate θ.
    replicates
        Of this figure or several. Resamples that lost a class are left out; then, and with fewer than 18 resamples,
        nothing is known of pairs and the spread stays too wide.
    name
        Which figure.
    """
    full, small, mixed = replicates.full[name], replicates.small[name], replicates.mixed[name]
    kept = np.isfinite(full)
    ratio = replicates.widen
    # The number of used tokens is no smooth function of the weights: a small step loses none.
    smooth = name != "used_tokens" and bool(kept.all()) and len(mixed) >= FEWEST
    full = full[kept]
    if smooth and full.std() > TINY:
        own, step = full[: len(small)].var(), small.var()
        pairs, triples = float(np.mean(mixed**2)), float(np.mean(replicates.triple[name] ** 2))
        # Where a figure is all pairs, half of the small steps' variance is left.
        fair = min(max(step - pairs + triples, step / 2), own)
        ratio *= float(np.sqrt(fair / own)) if own > 0 else 1.0
    centre = full.mean() if len(full) else 0.0
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
        likely = spread(value, replicates, name)
        if not len(likely):
            continue
        low, high = np.clip(np.quantile(likely, [tail, 1 - tail]), *bounds.get(name, (0.0, np.inf)))
        out[name] = (float(low), float(high))
    return out
