"""Learning curves: nested stratified draws, an end that is the score itself, and sentences that follow from them."""

import numpy as np
import pytest
import torch

from clustermim.errors import InputError
from clustermim.scoring.counts import TokenCounts
from clustermim.scoring.folds import plan_images
from clustermim.scoring.learning import (
    CurvePoint,
    _draw_units,
    curve_advice,
    enough_images,
    learning_curve,
    settled_images,
)
from clustermim.scoring.tcas import score_tokens


def tokens(seed, pull, vocab, images=400, patches=9):
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, 4, images))
    ids = rng.integers(0, vocab, (images, patches))
    return np.where(rng.random(ids.shape) < pull, labels[:, None] % vocab, ids), labels


def counted(ids, labels, vocab, **options):
    counts = TokenCounts(plan_images(labels, **options), vocab, per_image=True)
    counts.update(torch.from_numpy(ids), None, torch.arange(len(ids)))
    return counts


def test_a_curve_rises_to_the_score_of_all_images():
    ids, labels = tokens(0, 0.3, 200)
    curve = learning_curve(counted(ids, labels, 200), points=5, draws=3)
    sizes = [point.images for point in curve]
    assert sizes == sorted(sizes) and sizes[-1] == 400 and len(curve) == 5
    end = score_tokens(ids, labels, vocab_size=200)
    assert curve[-1].alignment == pytest.approx(end.alignment)
    assert curve[-1].alignment_crossfit == pytest.approx(end.alignment_crossfit, abs=0.02)
    assert curve[0].alignment_crossfit < curve[-1].alignment_crossfit < curve[-1].alignment < curve[0].alignment
    for point in curve:
        assert point.alignment_crossfit_min <= point.alignment_crossfit <= point.alignment_crossfit_max
        assert set(point.to_dict()) >= {"curve_images", "alignment_crossfit"}
    again = learning_curve(counted(ids, labels, 200), points=5, draws=3)
    assert again == curve


@pytest.mark.parametrize("grouped", [False, True])
def test_draws_are_nested_stratified_and_keep_groups_whole(grouped):
    labels = np.repeat([0, 1, 2], [8, 30, 90])
    groups = np.arange(128) // 2 if grouped else None
    plan = plan_images(labels, groups=groups)
    last = np.zeros(len(plan.strata))
    for share in (0.1, 0.3, 0.7, 1.0):
        kept = _draw_units(plan, share, [0, 3, 1])
        assert (kept >= last).all()
        last = kept
        for c in range(3):
            units = plan.strata % 3 == c
            assert kept[units].sum() == max(2, round(share * units.sum()))
    assert last.all()


def point(images, *draws):
    mean = float(np.mean(draws))
    return CurvePoint(
        images=images,
        alignment_crossfit=mean,
        alignment_crossfit_min=min(draws),
        alignment_crossfit_max=max(draws),
        alignment=mean,
        draws=draws,
    )


def test_enough_and_settled_are_read_off_the_curves():
    flat = [point(10, 0.02, 0.04), point(50, 0.10, 0.11), point(100, 0.11, 0.11), point(200, 0.11, 0.11)]
    rising = [point(10, 0.03, 0.03), point(50, 0.08, 0.09), point(100, 0.13, 0.12), point(200, 0.19, 0.19)]
    assert enough_images(flat) == 50 and enough_images(rising) is None
    assert settled_images({"flat": flat, "rising": rising}) == ("rising", 100)
    assert settled_images({"a": flat, "b": flat})[1] is None
    said = " ".join(curve_advice({"flat": flat, "rising": rising}))
    assert "50 for flat" in said and "Still rising at 200 labelled images: rising" in said
    assert "rising leads in every draw from 100" in said
    assert "not settled" in " ".join(curve_advice({"a": flat, "b": flat}))


def test_what_cannot_be_drawn_is_refused():
    ids, labels = tokens(0, 0.1, 5, images=20)
    with pytest.raises(InputError, match="per_image"):
        learning_curve(TokenCounts(plan_images(labels), 5))
    with pytest.raises(InputError, match="single image"):
        learning_curve(counted(ids, np.where(np.arange(20) == 0, 9, labels), 5))
    with pytest.raises(InputError, match="points"):
        learning_curve(counted(ids, labels, 5), points=1)
