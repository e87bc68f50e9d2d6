"""Scores against naive loops, and the properties that make them worth trusting."""

import copy
import itertools
import json
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from clustermim.scoring.counts import TokenCounts
from clustermim.scoring.figures import CROSSFIT, FIGURES, PLUG_IN, figures
from clustermim.scoring.folds import plan_images
from clustermim.scoring.intervals import bootstrap_figures
from clustermim.scoring.populations import make_population
from clustermim.scoring.sums import TokenSummer
from clustermim.scoring.tcas import score_counts, score_tokens

close = partial(pytest.approx, abs=1e-10, rel=1e-9)
quick = settings(deadline=None, max_examples=25)


@st.composite
def labelled_tokens(draw, smallest=1):
    """Ids and labels with unequal classes and a vocabulary from tiny to larger than the number of patches."""
    sizes = draw(st.lists(st.integers(smallest, 9), min_size=2, max_size=4))
    patches, vocab = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 7, 40, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    ids = rng.integers(0, vocab, (len(labels), patches))
    pull = draw(st.sampled_from([0.0, 0.5]))
    return np.where(rng.random(ids.shape) < pull, labels[:, None] % vocab, ids), labels, vocab


def table(ids, labels, classes, vocab, weights=None):
    counts = np.zeros((vocab, classes))
    for image, row in enumerate(ids):
        for token in row:
            counts[token, labels[image]] += 1 if weights is None else weights[image]
    return counts


def matrix_figures(walk, rows, cosine, prior):
    classes = len(prior)
    eye = np.eye(classes)
    adjacency = np.array(
        [[math.sqrt(prior[a]) * walk[a, b] / math.sqrt(prior[b]) for b in range(classes)] for a in range(classes)]
    )
    return {
        "alignment": 1 - ((eye - adjacency) ** 2).sum() / (classes - 1),
        "labelling_error": 1 - sum(prior[c] * walk[c, c] for c in range(classes)),
        "tcas": ((walk - eye) ** 2).sum() / classes**2,
        "tcas_rows": ((rows - eye) ** 2).sum() / classes**2,
        "tcas_cosine": ((cosine - eye) ** 2).sum() / classes**2,
    }


def cosine_of(a, b):
    length = math.sqrt((a**2).sum() * (b**2).sum())
    return (a * b).sum() / length if length else 0.0


def naive(ids, labels, vocab, plan, weights=None):
    """Every figure by the formulas of the design, in loops."""
    classes = labels.max() + 1
    full = table(ids, labels, classes, vocab, weights)
    size, prior = full.sum(), full.sum(0) / full.sum()
    walk, rows = np.zeros((2, classes, classes))
    for i in range(vocab):
        if full[i].sum() > 0:
            share = full[i] / full[i].sum()
            walk += np.outer(full[i] / full.sum(0), share)
            rows += np.outer(share, share)
    cosine = np.array([[cosine_of(full[:, a], full[:, b]) for b in range(classes)] for a in range(classes)])
    out = matrix_figures(walk, rows, cosine, prior)
    joint, marginal = full[full > 0] / size, full.sum(1)[full.sum(1) > 0] / size
    h_joint, h_token, h_class = (-(p * np.log(p)).sum() for p in (joint, marginal, prior))
    out["nmi"] = (h_token + h_class - h_joint) / ((h_token + h_class) / 2)
    out["purity"] = full.max(1).sum() / size
    out["entropy"] = h_joint - h_token
    out["perplexity"] = math.exp(h_token)
    out["used_tokens"] = (full.sum(1) > 0).sum()
    if not plan.num_folds:
        return out
    walk, rows, cosine, pairs = np.zeros((4, classes, classes))
    for fold in range(plan.num_folds):
        inside = plan.folds == fold
        kept = np.ones(len(labels)) if weights is None else weights
        own = table(ids, labels, classes, vocab, kept * inside)
        others = table(ids, labels, classes, vocab, kept * ~inside)
        for i in range(vocab):
            if own[i].sum() > 0:
                learned = others[i] / others[i].sum() if others[i].sum() > 0 else prior
                walk += np.outer(own[i] / own.sum(0), learned) / plan.num_folds
                rows += np.outer(own[i] / own[i].sum(), learned) / plan.num_folds
        pairs += np.array([[(own[:, a] * others[:, b]).sum() for b in range(classes)] for a in range(classes)])
    for a, b in itertools.product(range(classes), repeat=2):
        length = math.sqrt(pairs[a, a] * pairs[b, b])
        cosine[a, b] = min(1.0, pairs[a, b] / length) if length and a != b else 1.0
    return out | {f"{k}_crossfit": v for k, v in matrix_figures(walk, rows, cosine, prior).items()}


@quick
@given(labelled_tokens())
def test_every_figure_equals_the_naive_loops(case):
    ids, labels, vocab = case
    score = score_tokens(ids, labels, vocab_size=vocab)
    plan = plan_images(labels)
    expected = naive(ids, labels, vocab, plan)
    assert set(expected) == set(FIGURES if plan.num_folds else set(FIGURES) - set(CROSSFIT))
    for name, value in expected.items():
        assert getattr(score, name) == close(value), name
    if not plan.num_folds:
        assert all(getattr(score, name) is None for name in CROSSFIT)
        assert any("single image" in note for note in score.notes)
    flat = np.repeat(labels, ids.shape[1])
    assert score.nmi == pytest.approx(normalized_mutual_info_score(flat, ids.ravel()), abs=1e-9)


@quick
@given(labelled_tokens(smallest=2), st.integers(0, 100))
def test_reweighted_counts_equal_the_naive_loops_on_copied_images(case, seed):
    ids, labels, vocab = case
    plan = plan_images(labels)
    rng = np.random.default_rng(seed)
    weights = np.stack([rng.integers(0, 4, len(labels)), np.ones(len(labels), dtype=np.int64)]).astype(np.float64)
    cells = plan.folds * plan.num_classes + plan.labels
    for cell in np.unique(cells):
        weights[0, np.flatnonzero(cells == cell)[0]] = 1 + seed % 3
    counts = counted(ids, labels, vocab, plan, per_image=True)
    got = figures(TokenSummer(counts.rows()).sums(weights))
    for row in range(2):
        for name, value in naive(ids, labels, vocab, plan, weights[row]).items():
            assert got[name][row] == close(value), name


def counted(ids, labels, vocab, plan, per_image=False, batch=4):
    counts = TokenCounts(plan, vocab, per_image=per_image)
    for start in range(0, len(ids), batch):
        stop = min(start + batch, len(ids))
        counts.update(
            torch.from_numpy(ids[start:stop]), torch.from_numpy(labels[start:stop]), torch.arange(start, stop)
        )
    return counts


@quick
@given(labelled_tokens(), st.booleans())
def test_streamed_counts_score_the_same(case, per_image):
    ids, labels, vocab = case
    plan = plan_images(labels)
    streamed = score_counts(counted(ids, labels, vocab, plan, per_image)).to_dict()
    whole = score_tokens(ids, labels, vocab_size=vocab).to_dict()
    assert streamed.pop("notes") == whole.pop("notes")
    numbers = {name: value for name, value in whole.items() if value is not None}
    assert {name: streamed[name] for name in numbers} == close(numbers) and streamed.keys() == whole.keys()


def test_sparse_and_dense_tables_agree(monkeypatch):
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(0, 300, (60, 9)), rng.integers(0, 3, 60)
    dense = score_tokens(ids, labels).to_dict()
    monkeypatch.setattr("clustermim.scoring.counts.DENSE_CELLS", 0)
    monkeypatch.setattr("clustermim.scoring.counts.MERGE_AT", 10)
    monkeypatch.setattr("clustermim.scoring.sums.BLOCK", 10)
    sparse = score_tokens(ids, labels).to_dict()
    assert {name: sparse[name] for name in FIGURES} == close({name: dense[name] for name in FIGURES})


@quick
@given(labelled_tokens(smallest=2), st.integers(0, 99))
def test_renaming_tokens_changes_nothing(case, seed):
    ids, labels, vocab = case
    names = np.random.default_rng(seed).permutation(vocab)
    a, b = (score_tokens(x, labels, vocab_size=vocab).to_dict() for x in (ids, names[ids]))
    for name in FIGURES:
        assert a[name] == close(b[name]), name


@quick
@given(labelled_tokens(), st.integers(0, 99))
def test_permuting_images_changes_no_plug_in_figure(case, seed):
    ids, labels, vocab = case
    order = np.random.default_rng(seed).permutation(len(labels))
    a = score_tokens(ids, labels, vocab_size=vocab, crossfit=False)
    b = score_tokens(ids[order], labels[order], vocab_size=vocab, crossfit=False)
    for name in (*PLUG_IN, "nmi", "purity", "entropy", "perplexity", "used_tokens"):
        assert getattr(a, name) == close(getattr(b, name)), name


@quick
@given(labelled_tokens(), st.integers(1, 4))
def test_splitting_a_token_into_proportional_copies_changes_neither_tcas_nor_alignment(case, copies):
    ids, labels, vocab = case
    # Every patch is repeated `copies` times; then token 0 is split so that each of its patches gives one to each part.
    repeated = np.repeat(ids, copies, axis=1)
    part = np.tile(np.arange(copies), ids.shape[1])
    split = np.where(repeated == 0, vocab + part[None, :], repeated)
    a, b = score_tokens(ids, labels, crossfit=False), score_tokens(split, labels, crossfit=False)
    for name in ("tcas", "alignment", "labelling_error"):
        assert getattr(a, name) == close(getattr(b, name)), name


@quick
@given(labelled_tokens(), st.integers(0, 99))
def test_merging_tokens_never_raises_alignment_nor_lowers_the_labelling_error(case, seed):
    ids, labels, vocab = case
    merged = np.random.default_rng(seed).integers(0, max(1, vocab // 2), vocab)[ids]
    a, b = score_tokens(ids, labels, crossfit=False), score_tokens(merged, labels, crossfit=False)
    assert b.alignment <= a.alignment + 1e-10
    assert b.labelling_error >= a.labelling_error - 1e-10
    assert 0 <= b.alignment <= 1 and 0 <= a.alignment <= 1


@quick
@given(st.lists(st.integers(2, 8), min_size=2, max_size=5), st.integers(1, 4), st.integers(0, 99))
def test_controls_bracket_every_score(sizes, patches, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    shape = (len(labels), patches)
    identity = np.arange(labels.size * patches).reshape(shape)
    same = np.tile(np.arange(patches), (len(labels), 1))
    oracle = np.repeat(labels[:, None], patches, axis=1)
    score = score_tokens(identity, labels, bootstrap=20)
    assert score.alignment == close(1) and score.alignment_crossfit == pytest.approx(0)
    assert (score.alignment_crossfit_low, score.alignment_crossfit_high) == close((0, 0))
    alike = 1 - 1 / len(sizes)  # TCAS of classes that nothing tells apart
    cosine = (score.tcas_cosine_crossfit, score.tcas_cosine_crossfit_low, score.tcas_cosine_crossfit_high)
    assert cosine == close((alike,) * 3)
    score = score_tokens(oracle, labels, bootstrap=20)
    assert score.alignment == score.alignment_crossfit == score.alignment_crossfit_low == close(1)
    assert score.labelling_error_crossfit == score.tcas_crossfit == score.tcas_cosine_crossfit == close(0)
    # Position: every image holds each token once, so tokens are independent of class, exactly.
    score = score_tokens(same, labels)
    assert score.alignment == close(0)
    assert -0.5 < score.alignment_crossfit <= 1e-12
    assert score.tcas_cosine == close(alike) and score.tcas_cosine_crossfit == close(alike)


@pytest.mark.parametrize("case", ["weak", "strong", "bursty"])
def test_cross_fitted_cosine_of_small_classes_is_that_of_the_population(case):
    population = make_population(case, classes=20, vocab=300)
    directions = population.chances / np.linalg.norm(population.chances, axis=1, keepdims=True)
    truth = ((directions @ directions.T - np.eye(20)) ** 2).mean()
    score = score_tokens(*population.draw(600, 16, np.random.default_rng(1)), vocab_size=300)
    assert abs(score.tcas_cosine_crossfit - truth) < 0.03 < 0.05 < truth - score.tcas_cosine


@pytest.mark.parametrize("groups", [False, True])
def test_identity_is_zero_and_oracle_one_in_every_replicate(groups):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), [3, 5, 9, 20]))
    plan = plan_images(labels, groups=np.arange(len(labels)) // 2 if groups else None)
    if groups:
        assert plan.num_folds
    ids = np.arange(len(labels) * 4).reshape(-1, 4)
    got = bootstrap_figures(counted(ids, labels, ids.size, plan, per_image=True).rows(), plan, 50, 0)
    zero = got.full["alignment_crossfit"]
    assert np.abs(zero[np.isfinite(zero)]).max() < 1e-12 and np.isfinite(zero).any()
    plan = plan_images(labels, groups=labels * 20 + np.arange(len(labels)) // 8 if groups else None)
    assert plan.num_folds
    oracle = counted(np.repeat(labels[:, None], 4, axis=1), labels, 4, plan, per_image=True)
    one = bootstrap_figures(oracle.rows(), plan, 50, 0).full
    assert one["alignment_crossfit"] == close(np.ones(50)) and one["labelling_error_crossfit"] == close(np.zeros(50))


def test_tokens_too_rare_to_be_learned_count_as_the_prior():
    """E[C̄] − C = −Σ_i P(i unseen) Q[·, i](T[i, ·] − p), on a vocabulary so large that one sample is nearly its mean."""
    rng = np.random.default_rng(0)
    sizes, patches, vocab = np.array([20, 30, 50]), 400, 40_000
    chances = rng.dirichlet(np.ones(vocab)) * np.exp(1.5 * rng.normal(size=(3, vocab)))
    chances /= chances.sum(axis=1, keepdims=True)
    labels = np.repeat(np.arange(3), sizes)
    ids = np.stack([rng.choice(vocab, patches, p=chances[c]) for c in labels])
    prior = sizes / sizes.sum()
    learned = (chances.T * prior) / (chances.T @ prior)[:, None]
    unseen = np.prod((1 - chances) ** (0.8 * sizes * patches)[:, None], axis=0)
    bias = -(chances * unseen) @ (learned - prior)
    score = score_tokens(ids, labels, vocab_size=vocab)
    assert score.folds == 5 and np.abs(bias).max() > 0.06
    assert np.abs(score.walk_crossfit - chances @ learned - bias).max() < 0.012


def test_readings_differ_as_the_theory_says():
    def score(counts):
        token, label = (side.ravel() for side in np.indices(counts.shape))
        return score_tokens(np.repeat(token, counts.ravel())[:, None], np.repeat(label, counts.ravel()), crossfit=False)

    # With unequal classes a merge can lower tcas, though it lowers alignment.
    fine, coarse = (
        score(np.array(rows)) for rows in ([[0, 12, 0], [0, 12, 32], [1, 0, 32]], [[0, 12, 0], [1, 12, 64]])
    )
    assert (fine.tcas, coarse.tcas) == pytest.approx((0.243, 0.2326), abs=1e-4)
    assert (fine.alignment, coarse.alignment) == pytest.approx((0.388, 0.333), abs=1e-4)
    # With equal ones it is alignment on another scale.
    counts = np.random.default_rng(0).multinomial(90, np.full(6, 1 / 6), size=4).T
    equal = score(counts)
    assert equal.tcas == close(3 * (1 - equal.alignment) / 16)
    # Cutting every token in two alike doubles the class matrix of `rows`, and changes no cosine.
    halves = score(np.concatenate([counts, counts]))
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert equal.tcas_rows == close(((shares.T @ shares - np.eye(4)) ** 2).sum() / 16)
    assert halves.tcas_rows == close(((2 * shares.T @ shares - np.eye(4)) ** 2).sum() / 16)
    assert halves.tcas_cosine == close(equal.tcas_cosine) and halves.tcas == close(equal.tcas)


def test_random_tokens_score_about_zero_and_plug_in_flatters_them():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(10), 50)
    score = score_tokens(rng.integers(0, 1000, (500, 16)), labels, bootstrap=100)
    assert abs(score.alignment_crossfit) < 0.015 < 0.1 < score.alignment
    assert score.alignment_crossfit_low < score.alignment_crossfit < score.alignment_crossfit_high


def test_intervals_repeat_with_the_seed_and_are_none_without_a_bootstrap():
    rng = np.random.default_rng(2)
    ids, labels = rng.integers(0, 20, (80, 9)), rng.integers(0, 3, 80)
    first, again, other = (score_tokens(ids, labels, bootstrap=50, seed=s) for s in (0, 0, 1))
    assert first.to_dict() == again.to_dict()
    assert first.tcas_low != other.tcas_low
    plain = score_tokens(ids, labels)
    assert plain.alignment_low is None and plain.tcas_cosine_crossfit_high is None
    with pytest.raises(AttributeError):
        _ = plain.nonsense_low


def test_a_score_is_a_flat_json_record_that_pickles():
    rng = np.random.default_rng(3)
    score = score_tokens(rng.integers(0, 5, (30, 4)), rng.integers(0, 2, 30), bootstrap=10)
    record = json.loads(json.dumps(score.to_dict()))
    assert {f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")} <= record.keys()
    assert pickle.loads(pickle.dumps(score)).to_dict() == copy.deepcopy(score).to_dict() == score.to_dict()


@quick
@given(labelled_tokens(smallest=2))
def test_token_and_class_rows_add_up(case):
    ids, labels, vocab = case
    score = score_tokens(ids, labels, vocab_size=vocab)
    tokens = score.token_rows(limit=None)
    assert sum(row["share"] for row in tokens) == pytest.approx(1)
    assert sum(row["share"] * row["error"] for row in tokens) == close(score.labelling_error)
    assert sum(row["share"] * row["class_share"] for row in tokens) == pytest.approx(score.purity)
    assert sum(row["share"] * row["entropy"] for row in tokens) == close(score.entropy)
    assert [row["error_share"] for row in tokens] == sorted((row["error_share"] for row in tokens), reverse=True)
    classes = score.class_rows()
    assert 1 - sum(row["share"] * row["stays"] for row in classes) == pytest.approx(score.labelling_error_crossfit)
    assert all(row["class"] != row["confused_with"] for row in classes)


def test_labels_need_not_be_dense_and_absent_classes_are_told():
    rng = np.random.default_rng(4)
    ids, labels = rng.integers(0, 5, (40, 4)), rng.choice([3, 7, 9], 40)
    score = score_tokens(ids, labels, num_classes=10)
    same = score_tokens(ids, np.searchsorted([3, 7, 9], labels))
    assert score.alignment_crossfit == same.alignment_crossfit and score.num_classes == 3
    assert any("7 of 10 classes" in note for note in score.notes)
    assert {row["class"] for row in score.class_rows()} == {3, 7, 9}


def test_fast_enough_for_identity_tokens_of_many_images():
    labels = np.arange(5000) % 10
    score = score_tokens(np.arange(5000 * 64).reshape(5000, 64), labels, bootstrap=20)
    assert score.used_tokens == 5000 * 64 and abs(score.alignment_crossfit) < 1e-12
