"""Intervals: mirrored, rid of the excess spread of pairs, and right about truths that are known."""

import numpy as np
import pytest

from clustermim.scoring.intervals import STEP, Replicates, _small_moves, basic_intervals, spread
from clustermim.scoring.populations import CASES, make_population
from clustermim.scoring.tcas import score_tokens


def replicates_of(figure, units, replicates, seed=0):
    """What `bootstrap_figures` keeps, for a figure given as a function of the weights of units, (b, units) -> (b,)."""
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(units, np.full(units, 1 / units), size=replicates).astype(np.float64)
    here = {"nmi": figure(np.ones((1, units)))}
    small, mixed, triple = _small_moves(lambda w: {"nmi": figure(w)}, STEP * (weights[:600] - 1), here)
    return Replicates(full={"nmi": figure(weights)}, small=small, mixed=mixed, triple=triple)


def test_a_linear_figure_keeps_its_spread_and_a_paired_one_loses_two_thirds():
    rng = np.random.default_rng(0)
    images = rng.normal(size=200)
    images -= images.mean()
    linear = replicates_of(lambda w: (w * images).sum(axis=1) / 200, 200, 2000)
    assert spread(0.0, linear, "nmi").std() == pytest.approx(linear.full["nmi"].std(), rel=0.1)
    # Σ_{x<x'} γ_xx' w_x w_x' with centred γ is all pairs: a resample has three times its variance.
    noise = rng.normal(size=(200, 200))
    noise = np.triu(noise, 1)
    noise = np.triu(noise - noise.sum() / (200 * 199 / 2), 1)
    pairs = replicates_of(lambda w: np.einsum("bx,xy,by->b", w, noise, w), 200, 2000)
    fair = spread(float(noise.sum()), pairs, "nmi").std()
    assert fair == pytest.approx(np.sqrt((noise**2).sum()), rel=0.2)
    assert pairs.full["nmi"].std() > 1.5 * fair
    # Σ_{x<x'<x''} δ w w' w'' is all triples: a resample has seven times its variance.
    order = np.arange(24)
    apart = (order[:, None, None] < order[None, :, None]) & (order[None, :, None] < order[None, None, :])
    deltas = np.where(apart, rng.normal(size=(24, 24, 24)), 0.0)
    triples = replicates_of(lambda w: np.einsum("bx,by,bz,xyz->b", w, w, w, deltas, optimize=True), 24, 1500)
    fair, true = spread(0.0, triples, "nmi").std(), np.sqrt((deltas**2).sum())
    assert 0.6 * true < fair < 1.6 * true < triples.full["nmi"].std()


def test_steps_show_parts_of_one_two_and_three_images_as_the_theory_says():
    """Four units with signs x, parts a·x, b·xx′, c·xx′x″, over all samples and all resamples of signs: exact."""
    signs = 1.0 - 2.0 * (np.arange(16)[:, None] >> np.arange(4) & 1)
    first, second, third = (grid.ravel() for grid in np.meshgrid(*[np.arange(16)] * 3))
    steps = np.stack([signs[first], signs[second], signs[third]], axis=1).reshape(-1, 4)
    shown = {"full": 0.0, "small": 0.0, "mixed": 0.0, "triple": 0.0}
    for sample in signs:

        def figure(weights, sample=sample):
            one, square, cube = ((sample * weights) ** n @ np.ones(4) for n in (1, 2, 3))
            # Newton: the sums over pairs and triples of different units.
            return 0.7 * one + 0.4 * (one**2 - square) / 2 + 0.9 * (one**3 - 3 * one * square + 2 * cube) / 6

        moves = _small_moves(lambda w: {"nmi": figure(w)}, STEP * steps, {"nmi": figure(np.ones((1, 4)))})
        shown["full"] += figure(1 + signs).var() / 16
        for name, move in zip(("small", "mixed", "triple"), moves, strict=True):
            shown[name] += (move["nmi"].var() if name == "small" else np.mean(move["nmi"] ** 2)) / 16
    one, two, three, s = 4 * 0.7**2, 6 * 0.4**2, 4 * 0.9**2, STEP
    assert shown["full"] == pytest.approx(one + 3 * two + 7 * three)
    assert shown["small"] == pytest.approx(one + (2 + s**2) * two + (3 + 3 * s**2 + s**4) * three)
    assert shown["mixed"] == pytest.approx(two + (3 + 3 * s**2) * three)
    assert shown["triple"] == pytest.approx(three)


def test_intervals_mirror_the_replicates_at_the_estimate():
    full, few = np.linspace(0.3, 0.5, 1001), np.zeros(3)
    figures = {"nmi": full, "purity": full * np.nan}
    replicates = Replicates(
        full=figures,
        small=dict.fromkeys(figures, few),
        mixed=dict.fromkeys(figures, few),
        triple=dict.fromkeys(figures, few),
    )
    assert basic_intervals({"nmi": 0.3}, replicates)["nmi"] == pytest.approx((0.105, 0.295))
    assert basic_intervals({"nmi": 0.01}, replicates)["nmi"] == pytest.approx((0.0, 0.0))
    assert basic_intervals({"purity": 0.3}, replicates) == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [None, (1, 1, 1, 2, 2, 3, 4, 5, 6, 8)], ids=["equal", "unequal"])
def test_known_truths_are_covered(case, sizes):
    """500 images, K = 1000, 150 samples of each population; benchmarks/score_simulations.py takes more."""
    population = make_population(case, sizes=sizes)
    truth = population.alignment
    crossfit, plug_in, covered = [], [], []
    for seed in range(150):
        ids, labels = population.draw(500, 64, np.random.default_rng([1, seed]))
        score = score_tokens(ids, labels, vocab_size=1000, bootstrap=200, seed=seed)
        crossfit.append(score.alignment_crossfit)
        plug_in.append(score.alignment)
        covered.append(score.alignment_crossfit_low <= truth <= score.alignment_crossfit_high)
    bias, flattery = np.mean(crossfit) - truth, np.mean(plug_in) - truth
    print(f"{case}: truth {truth:.4f}, bias {bias:+.4f}, plug-in {flattery:+.4f}, covered {np.mean(covered):.3f}")
    assert abs(bias) < abs(flattery)
    assert abs(bias) <= 0.005
    assert 0.90 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize("case", CASES)
def test_populations_are_what_they_are_said_to_be(case):
    population = make_population(case, classes=4, vocab=60, sizes=(1, 2, 3, 4))
    assert population.chances.sum(axis=1) == pytest.approx(np.ones(4)) and 0 < population.alignment < 1
    ids, labels = population.draw(400, 40, np.random.default_rng(0))
    assert np.bincount(labels).tolist() == [40, 80, 120, 160] and ids.shape == (400, 40)
    counts = np.stack([np.bincount(ids[labels == c].ravel(), minlength=60) for c in range(4)])
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert np.abs(shares - population.chances).max() < 0.05
    # Favourite tokens recur within an image more than between images of a class.
    repeats = np.mean([len(np.unique(row)) for row in ids])
    plain = make_population("weak", classes=4, vocab=60).draw(400, 40, np.random.default_rng(0))[0]
    if case == "bursty":
        assert repeats < np.mean([len(np.unique(row)) for row in plain])
    assert score_tokens(ids, labels, vocab_size=60).alignment_crossfit == pytest.approx(population.alignment, abs=0.05)
