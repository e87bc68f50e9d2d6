"""Labels of patches, and several labels an image: the same figures from other counts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.errors import InputError
from clustermim.scoring.counts import TokenCounts
from clustermim.scoring.dense import patch_classes
from clustermim.scoring.figures import COMPANIONS, FIGURES, PLUG_IN
from clustermim.scoring.folds import plan_images
from clustermim.scoring.intervals import bootstrap_figures
from clustermim.scoring.learning import learning_curve
from clustermim.scoring.tcas import score_tokens

quick = settings(deadline=None, max_examples=25)


def figures_of(score, names=FIGURES):
    return {name: getattr(score, name) for name in names if getattr(score, name) is not None}


@quick
@given(st.integers(0, 2**16), st.booleans())
def test_one_class_an_image_scores_the_same_in_all_three_forms(seed, bootstrap):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(6) % 3, rng.integers(0, 3, 20)])
    ids = rng.integers(0, 9, (26, 5))
    replicates = 10 if bootstrap else 0
    image = score_tokens(ids, labels, bootstrap=replicates)
    dense = score_tokens(ids, np.repeat(labels[:, None], 5, axis=1), bootstrap=replicates)
    many = score_tokens(ids, np.eye(3, dtype=bool)[labels], bootstrap=replicates)
    assert figures_of(many) == pytest.approx(figures_of(image), abs=1e-12)
    # Five patches a class weigh more than one image in dealing folds, so only plug-in figures must agree.
    names = (*PLUG_IN, *COMPANIONS)
    assert figures_of(dense, names) == pytest.approx(figures_of(image, names), abs=1e-12)
    if bootstrap:
        assert many.intervals["alignment"] == pytest.approx(image.intervals["alignment"])


@quick
@given(st.integers(0, 2**16))
def test_patch_labels_count_each_patch_where_it_belongs(seed):
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(0, 6, (15, 4)), rng.integers(-1, 3, (15, 4))
    labels[:3] = np.arange(3)[:, None]
    score = score_tokens(ids, labels, vocab_size=6)
    kept = labels.ravel() >= 0
    # Every labelled patch as an image of its own.
    alone = score_tokens(ids.ravel()[kept, None], labels.ravel()[kept], vocab_size=6)
    names = (*PLUG_IN, *COMPANIONS)
    assert figures_of(score, names) == pytest.approx(figures_of(alone, names), abs=1e-12)
    assert score.patches == kept.sum() and score.images == 15


@quick
@given(st.integers(0, 2**16))
def test_an_image_of_several_classes_counts_in_each(seed):
    rng = np.random.default_rng(seed)
    ids, members = rng.integers(0, 6, (15, 4)), rng.random((15, 3)) < 0.4
    members[np.arange(15), np.arange(15) % 3] = True
    score = score_tokens(ids, members, vocab_size=6)
    image, label = np.nonzero(members)
    # Every membership as an image of its own, kept together by groups: same counts, same groups, same folds.
    apart = score_tokens(ids[image], label, vocab_size=6, groups=image)
    assert figures_of(score) == pytest.approx(figures_of(apart), abs=1e-12)


@pytest.mark.parametrize("kind", ["patches", "many"])
def test_controls_bracket_these_scores_too(kind):
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 4, (60, 6)) if kind == "patches" else rng.random((60, 4)) < 0.4
    if kind == "many":
        labels[np.arange(60), np.arange(60) % 4] = True
    identity = np.arange(360).reshape(60, 6)
    plan = plan_images(labels)
    counts = TokenCounts(plan, 360, per_image=True)
    counts.update(torch.from_numpy(identity), None, torch.arange(60))
    replicates = bootstrap_figures(counts.rows(), plan, 30, 0)
    assert np.abs(replicates.full["alignment_crossfit"]).max() < 1e-12
    assert np.abs(replicates.small["alignment_crossfit"]).max() < 1e-11
    if kind == "patches":
        oracle = score_tokens(np.maximum(labels, 0), labels, bootstrap=10)
        assert oracle.alignment_crossfit == pytest.approx(1) and oracle.alignment_crossfit_low == pytest.approx(1)
        curve = learning_curve(counts, points=3, draws=2)
        assert curve[-1].images == 60 and abs(curve[0].alignment_crossfit) < 1e-12


@quick
@given(st.integers(0, 2**16))
def test_patch_classes_are_the_commonest_pixels(seed):
    rng = np.random.default_rng(seed)
    masks = rng.choice([0, 1, 2, 255], (2, 4, 6))
    got = patch_classes(torch.from_numpy(masks), 2).numpy()
    for image in range(2):
        for n, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
            pixels = masks[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel()
            counts = [(pixels == value).sum() for value in (0, 1, 2, 255)]
            assert got[image, n] == (0, 1, 2, -1)[int(np.argmax(counts))]


def test_masks_that_cannot_be_cut_are_refused():
    with pytest.raises(InputError, match="do not divide"):
        patch_classes(torch.zeros(1, 4, 6, dtype=torch.int64), 4)
    with pytest.raises(InputError, match="negative classes"):
        patch_classes(torch.full((1, 4, 4), -3), 2)
    assert patch_classes(torch.full((1, 4, 4), -1), 2, ignore_index=-1).unique().tolist() == [-1]
