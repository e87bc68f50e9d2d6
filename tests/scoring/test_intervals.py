"""Intervals: mirrored, rid of the excess spread of pairs, and right about truths that are known."""

import numpy as np
import pytest

from clustermim.scoring.figures import alignment_of
from clustermim.scoring.intervals import Replicates, basic_intervals, spread
from clustermim.scoring.tcas import score_tokens


def test_a_linear_figure_keeps_its_spread_and_a_paired_one_loses_two_thirds():
    rng = np.random.default_rng(0)
    images = rng.normal(size=200)
    images -= images.mean()
    weights = rng.multinomial(200, np.full(200, 1 / 200), size=2000).astype(np.float64)
    half = (1 + weights[:500]) / 2
    mean = [(w * images).sum(axis=1) / 200 for w in (weights, half)]
    assert spread(0.0, *mean).std() == pytest.approx(mean[0].std(), rel=0.1)
    # Σ_{x≠x'} z_x z_x' w_x w_x' with centred z is all pairs: a resample has three times its variance.
    noise = rng.normal(size=(200, 200))
    noise = np.triu(noise, 1)
    noise -= noise.mean()
    pairs = [np.einsum("bx,xy,by->b", w, np.triu(noise, 1), w) for w in (weights, half)]
    fair = spread(float(noise.sum()), *pairs).std()
    assert fair == pytest.approx(np.sqrt((np.triu(noise, 1) ** 2).sum()), rel=0.2)
    assert pairs[0].std() > 1.5 * fair


def test_intervals_mirror_the_replicates_at_the_estimate():
    full = np.linspace(0.3, 0.5, 1001)
    replicates = Replicates(full={"nmi": full, "purity": full * np.nan}, half={"nmi": full[:3], "purity": full[:3]})
    assert basic_intervals({"nmi": 0.3}, replicates)["nmi"] == pytest.approx((0.105, 0.295))
    assert basic_intervals({"nmi": 0.01}, replicates)["nmi"] == pytest.approx((0.0, 0.0))
    assert basic_intervals({"purity": 0.3}, replicates) == {}


def population(case, rng, classes=10, vocab=1000):
    """p(token | class) of a made-up population: uneven tokens, classes that differ a little or a lot."""
    depth = {"weak": 0.4, "strong": 0.9, "bursty": 0.4}[case]
    chances = rng.dirichlet(np.ones(vocab)) * np.exp(depth * rng.normal(size=(classes, vocab)))
    return chances / chances.sum(axis=1, keepdims=True)


def true_alignment(chances):
    prior = np.full(len(chances), 1 / len(chances))
    joint = chances.T * prior
    walk = chances @ (joint / joint.sum(axis=1, keepdims=True))
    return float(alignment_of(walk[None], prior[None])[0])


def sample(case, chances, rng, images=500, patches=64):
    """Labelled images; in the bursty case each image has its own few favourite tokens."""
    labels = np.arange(images) % len(chances)
    ids = np.empty((images, patches), dtype=np.int64)
    for image, label in enumerate(labels):
        own = rng.gamma(300 * chances[label]) if case == "bursty" else chances[label]
        ids[image] = rng.choice(len(own), patches, p=own / own.sum())
    return ids, labels


@pytest.mark.slow
@pytest.mark.parametrize("case", ["weak", "strong", "bursty"])
def test_known_truths_are_covered(case):
    """500 images, K = 1000, 200 samples of each population."""
    chances = population(case, np.random.default_rng(0))
    truth = true_alignment(chances)
    crossfit, plug_in, covered = [], [], []
    for seed in range(200):
        ids, labels = sample(case, chances, np.random.default_rng([1, seed]))
        score = score_tokens(ids, labels, vocab_size=1000, bootstrap=200, seed=seed)
        crossfit.append(score.alignment_crossfit)
        plug_in.append(score.alignment)
        covered.append(score.alignment_crossfit_low <= truth <= score.alignment_crossfit_high)
    bias, flattery = np.mean(crossfit) - truth, np.mean(plug_in) - truth
    print(f"{case}: truth {truth:.4f}, bias {bias:+.4f}, plug-in {flattery:+.4f}, covered {np.mean(covered):.3f}")
    assert abs(bias) < abs(flattery)
    assert abs(bias) <= (0.005 if case == "weak" else 0.02)
    assert 0.90 <= np.mean(covered) <= 0.98
