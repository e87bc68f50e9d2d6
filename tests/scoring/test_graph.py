"""The augmentation graph against closed forms, dense algebra, and the token counts it shares its formulas with."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from clustermim.errors import InputError
from clustermim.scoring import graph
from clustermim.scoring.graph import augmentation_spectrum, mask_graph, toy_model
from clustermim.scoring.tcas import score_tokens

quick = settings(deadline=None, max_examples=30)


@pytest.mark.parametrize("n", range(2, 21, 2))
def test_toy_model_has_the_derived_eigenvalues_and_labelling_errors(n):
    for m in range(0, n + 1, 2):
        t = 1 - m / n
        for tokens, second, walk in (("identity", t**2, t**3), ("class-wise", t**3, t**4), ("cross-class", 0, 0)):
            weights, merged, members = toy_model(n, m, tokens)
            report = augmentation_spectrum(weights, merged, members)
            assert weights.sum() == pytest.approx(1)
            assert report.eigenvalues[0] == pytest.approx(1, abs=1e-9)
            assert report.eigenvalues[1] == pytest.approx(second, abs=1e-9), (n, m, tokens)
            assert report.spectral_gap == pytest.approx(1 - second, abs=1e-9)
            assert report.sum_squared == pytest.approx(1 + second**2, abs=1e-9)
            assert report.labelling_error == pytest.approx((1 - walk) / 2, abs=1e-9)
            assert report.bound(1, 3) == pytest.approx(1 + second**2 + 3 * (1 - walk) / 2, abs=1e-9)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 3.0])
def test_the_bound_ranks_the_toy_tokenizers_rightly_just_where_the_theory_says(ratio):
    n = 40
    for m in range(2, n, 2):
        t = 1 - m / n
        bound = {}
        for tokens in ("identity", "class-wise", "cross-class"):
            weights, merged, members = toy_model(n, m, tokens)
            bound[tokens] = augmentation_spectrum(weights, merged, members).bound(1, ratio)
        if min(abs(ratio - 2 * t), abs(ratio - 2 * t * (1 + t))) > 1e-9:
            ranked = bound["class-wise"] < bound["identity"] < bound["cross-class"]
            assert ranked == (2 * t < ratio < 2 * t * (1 + t))


def random_graph(seed, n1=9, n2=14, density=0.5):
    rng = np.random.default_rng(seed)
    weights = rng.random((n1, n2)) * (rng.random((n1, n2)) < density)
    weights[np.arange(n1), rng.integers(0, n2, n1)] += 0.1
    return rng, weights


@quick
@given(st.integers(0, 2**16), st.booleans())
def test_spectrum_and_class_edges_equal_dense_loops(seed, soft):
    rng, weights = random_graph(seed)
    tokens, labels = rng.integers(0, 5, 14), rng.integers(0, 3, 9)
    members = rng.random((9, 3)) if soft else np.eye(3)[labels]
    report = augmentation_spectrum(weights, tokens, members if soft else labels)
    merged = np.stack([weights[:, tokens == t].sum(1) for t in range(5)], 1)
    merged = merged[:, merged.sum(0) > 0]
    adjacency = np.zeros((9, 9))
    pairs = np.zeros((9, 9))
    for a in range(9):
        for b in range(9):
            for s in range(merged.shape[1]):
                through = merged[a, s] * merged[b, s] / merged[:, s].sum()
                pairs[a, b] += through / merged.sum()
                adjacency[a, b] += through / np.sqrt(merged[a].sum() * merged[b].sum())
    values = np.sort(np.linalg.eigvalsh(adjacency))[::-1][: len(report.eigenvalues)]
    assert report.eigenvalues == pytest.approx(values, abs=1e-9)
    assert report.sum_squared == pytest.approx((adjacency**2).sum())
    y = members / members.sum(1, keepdims=True)
    same = y @ y.T
    assert report.labelling_error == pytest.approx(1 - (pairs * same).sum(), abs=1e-12)
    apart = 1 - np.eye(9)
    if (same * apart).sum() > 0:
        assert report.intra_class == pytest.approx((adjacency * same * apart).sum() / (same * apart).sum(), abs=1e-12)
    different = (1 - same) * apart
    if different.sum() > 0:
        assert report.inter_class == pytest.approx((adjacency * different).sum() / different.sum(), abs=1e-12)


@quick
@given(st.integers(0, 2**16))
def test_scale_order_and_storage_do_not_matter(seed):
    rng, weights = random_graph(seed)
    tokens, labels = rng.integers(0, 6, 14), rng.integers(0, 2, 9)
    report = augmentation_spectrum(weights, tokens, labels)
    rows, columns = rng.permutation(9), rng.permutation(14)
    same = augmentation_spectrum(
        sparse.coo_array(7.0 * weights[rows][:, columns]), 3 + tokens[columns], torch.from_numpy(labels[rows])
    )
    assert same.eigenvalues == pytest.approx(report.eigenvalues, abs=1e-9)
    for name in ("sum_squared", "labelling_error", "components", "hidden"):
        assert getattr(same, name) == pytest.approx(getattr(report, name), abs=1e-9)


@quick
@given(st.integers(0, 2**16))
def test_merging_never_raises_an_eigenvalue_nor_lowers_the_labelling_error(seed):
    rng, weights = random_graph(seed)
    tokens, labels = rng.integers(0, 8, 14), rng.integers(0, 3, 9)
    fine = augmentation_spectrum(weights, tokens, labels)
    coarse = augmentation_spectrum(weights, tokens // 2, labels)
    shared = min(len(fine.eigenvalues), len(coarse.eigenvalues))
    assert (coarse.eigenvalues[:shared] <= fine.eigenvalues[:shared] + 1e-9).all()
    assert coarse.sum_squared <= fine.sum_squared + 1e-9
    assert coarse.labelling_error >= fine.labelling_error - 1e-9
    assert fine.components <= augmentation_spectrum(weights).components


def test_labelling_error_is_that_of_the_token_counts():
    """One visible view an image that hides every patch: the graph's R is the table of token-class counts."""
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(0, 7, (30, 6)), rng.integers(0, 3, 30)
    weights = mask_graph(np.ones((30, 6), dtype=bool), np.arange(30), 30)
    report = augmentation_spectrum(weights, ids.ravel(), labels)
    assert report.labelling_error == pytest.approx(score_tokens(ids, labels).labelling_error)


def test_mask_graph_joins_views_to_their_hidden_patches():
    hidden = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 0]], dtype=bool)
    weights = mask_graph(hidden, np.array([0, 0, 1]), 2).toarray()
    assert weights == pytest.approx(np.array([[0.5, 0.5, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0, 0], [0, 0, 0, 1, 0, 0]]))
    report = augmentation_spectrum(weights, labels=[0, 0, 1])
    assert report.components == 2 and report.labelling_error == 0 and report.inter_class == pytest.approx(0)
    assert report.eigenvalues[:2] == pytest.approx([1, 1])


def test_large_graphs_give_the_largest_eigenvalues(monkeypatch):
    _, weights = random_graph(3, 40, 60)
    exact = augmentation_spectrum(weights, k=5)
    assert len(exact.eigenvalues) == 5
    monkeypatch.setattr(graph, "EXACT_SIDE", 10)
    iterated = augmentation_spectrum(sparse.csr_matrix(weights), k=5)
    assert iterated.eigenvalues == pytest.approx(exact.eigenvalues, abs=1e-9)
    assert iterated.sum_squared == pytest.approx(exact.sum_squared)


def test_without_labels_there_is_no_error_and_no_bound():
    report = augmentation_spectrum(np.ones((2, 2)))
    assert report.labelling_error is report.intra_class is report.inter_class is report.bound() is None
    assert report.to_dict()["bound"] is None and report.to_dict()["second_eigenvalue"] == pytest.approx(0)
    assert augmentation_spectrum(np.ones((2, 1))).spectral_gap == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": -np.eye(2)}, "negative"),
        ({"weights": np.full((2, 2), np.nan)}, "NaN"),
        ({"weights": np.full((2, 2), np.inf)}, "infinite"),
        ({"weights": np.ones(3)}, "shape"),
        ({"weights": np.ones((0, 3))}, "shape"),
        ({"weights": np.diag([1.0, 0.0])}, "1 of 2 visible views"),
        ({"weights": np.eye(2), "tokens": [0]}, "one entry per hidden view"),
        ({"weights": np.eye(2), "tokens": [0, -1]}, "negative"),
        ({"weights": np.eye(2), "labels": [0, 1, 1]}, "per visible view"),
        ({"weights": np.eye(2), "labels": [0, -1]}, "negative"),
        ({"weights": np.eye(2), "labels": [[1.0, np.nan], [0.0, 1.0]]}, "NaN"),
        ({"weights": np.eye(2), "labels": [[1.0, -1.0], [0.0, 1.0]]}, "≥ 0"),
        ({"weights": np.eye(2), "labels": [[0.0, 0.0], [0.0, 1.0]]}, "belongs to no class"),
        ({"weights": np.eye(2), "k": 1}, "k must be"),
    ],
)
def test_bad_graphs_are_refused_in_words(arguments, message):
    with pytest.raises(InputError, match=message):
        augmentation_spectrum(**arguments)


@pytest.mark.parametrize(("n", "m", "tokens"), [(3, 0, "identity"), (4, 1, "identity"), (4, 6, "identity")])
def test_bad_toys_are_refused(n, m, tokens):
    with pytest.raises(InputError, match="even"):
        toy_model(n, m, tokens)
