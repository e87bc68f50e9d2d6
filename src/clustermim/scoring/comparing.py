"""Is tokenizer A better than B? Both are scored on the same resamples of the same images, so the answer is paired."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clustermim.errors import InputError, nearest
from clustermim.scoring.figures import FIGURES, HIGHER_IS_BETTER
from clustermim.scoring.intervals import LEVEL, spread
from clustermim.scoring.tcas import TokenScore


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How figure `figure` of A differs from that of B on the same images."""

    figure: str
    difference: float
    """A − B."""
    low: float
    """Lower end of the 95 % basic bootstrap interval of the difference."""
    high: float
    probability: float
    """Share of resamples, bias taken out, in which A is better; ties count half."""


def compare(a: TokenScore, b: TokenScore, figure: str | None = None) -> Comparison:
    """Compare two scores made with a bootstrap on the same images with the same seed.

    The replicates of the difference are mirrored at the estimate and rid of their excess, as for an interval
    (`intervals.spread`). What the two tokenizers share (which images were drawn) cancels in every pair.

    Parameters
    ----------
    a, b
        Scores with `bootstrap` > 0.
    figure
        Which figure. Default: cross-fitted alignment, or plug-in alignment where there are no folds.

    Raises
    ------
    InputError
        Scores without a bootstrap, on other images, with another seed; an unknown figure.
    """
    if figure is None:
        figure = "alignment" if a.alignment_crossfit is None else "alignment_crossfit"
    if figure not in FIGURES:
        raise InputError(f"There is no figure {figure!r}.{nearest(figure, FIGURES)}")
    if not a.bootstrap or a.bootstrap != b.bootstrap:
        raise InputError("Both scores need the same number of bootstrap replicates; score both with bootstrap=1000.")
    if a.seed != b.seed or not _same_images(a, b):
        raise InputError("The two scores were made on different images or with different seeds, so they do not pair.")
    ours, theirs = a.replicates, b.replicates
    if ours is None or theirs is None or figure not in ours.full or figure not in theirs.full:
        raise InputError(f"{figure} is not known here: a class with a single image leaves plug-in figures only.")
    difference = float(getattr(a, figure) - getattr(b, figure))
    likely = spread(difference, ours.minus(theirs, figure), figure)
    low, high = np.quantile(likely, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    better = likely if figure in HIGHER_IS_BETTER else -likely
    # Rounding must not decide between tokenizers that are equal.
    equal = np.abs(better) < 1e-12
    probability = float(np.mean((better > 0) & ~equal) + np.mean(equal) / 2)
    return Comparison(figure=figure, difference=difference, low=float(low), high=float(high), probability=probability)


def compare_all(scores: Mapping[str, TokenScore]) -> dict[str, dict[str, Comparison]]:
    """Each tokenizer against each other one: name -> other name -> how the first differs from the second.

    Empty where nothing can be compared fairly: without a bootstrap, or where only plug-in figures are known, which
    favour the larger vocabulary.
    """
    if any(score.alignment_crossfit is None or not score.bootstrap for score in scores.values()):
        return {}
    return {a: {b: compare(scores[a], scores[b]) for b in scores if b != a} for a in scores}


def _same_images(a: TokenScore, b: TokenScore) -> bool:
    return all(
        np.array_equal(getattr(a.plan, name), getattr(b.plan, name)) for name in ("folds", "labels", "units", "classes")
    )
