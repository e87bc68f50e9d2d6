"""Retrieval, clustering and few-shot against naive computations."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from clustermim.evaluation.cluster import Clusters, best_matching, fit_clusters
from clustermim.evaluation.fewshot import draw_order, fit_fewshot
from clustermim.evaluation.judging import Truth
from clustermim.evaluation.retrieval import RetrievalJudge, average_precision


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 30), st.integers(1, 6), st.integers(2, 4), st.integers(0, 2**31))
def test_average_precision_equals_scikit_learns(n: int, m: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gallery, queries = torch.randn(n, 5, generator=generator), torch.randn(m, 5, generator=generator)
    labels, wanted = (
        torch.randint(classes, (n,), generator=generator),
        torch.randint(classes, (m,), generator=generator),
    )
    found = average_precision(gallery, labels, queries, wanted, at_once=2 * n)
    for i in range(m):
        relevant = (labels == wanted[i]).numpy()
        similar = (queries[i] @ gallery.T).numpy()
        expected = average_precision_score(relevant, similar) if relevant.any() else 0.0
        assert float(found[i]) == pytest.approx(expected, abs=1e-5)


def test_retrieval_has_its_best_and_its_chance_value() -> None:
    labels = torch.arange(60) % 3
    clean = torch.nn.functional.one_hot(labels, 3).float()
    truth = Truth(labels, None, 3)
    assert RetrievalJudge(clean, labels).answer(7 * clean).figures(truth)[0]["map"] == 1
    noise = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    many = RetrievalJudge(noise, torch.arange(3000) % 3).answer(noise[:60] * 0 + torch.randn(60, 8))
    assert many.figures(truth)[0]["map"] == pytest.approx(1 / 3, abs=0.02)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(2, 4), st.integers(0, 2**31))
def test_the_matching_is_the_best_of_all(n: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    assigned, labels = (torch.randint(classes, (n,), generator=generator) for _ in range(2))
    match = best_matching(assigned, labels, classes)
    best = max(int((torch.tensor(order)[assigned] == labels).sum()) for order in itertools.permutations(range(classes)))
    assert int((match[assigned] == labels).sum()) == best and sorted(match.tolist()) == list(range(classes))


def test_names_of_clusters_do_not_matter() -> None:
    labels = torch.arange(90) % 3
    truth = Truth(labels, None, 3)
    for order in itertools.permutations(range(3)):
        row = Clusters(torch.tensor(order)[labels]).figures(truth)[0]
        assert (row["accuracy"], row["nmi"], row["ari"]) == (1, pytest.approx(1), 1)


def test_clusters_are_found_without_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 4
    features = 3 * torch.nn.functional.one_hot(labels, 6).float() + 0.2 * torch.randn(120, 6, generator=generator)
    row = fit_clusters(features, 4).answer(features).figures(Truth(labels, None, 4))[0]
    assert row["accuracy"] == 1


def test_draws_hold_so_many_of_each_class_and_larger_ones_contain_smaller() -> None:
    labels = torch.tensor([0] * 7 + [1] * 5 + [2] * 9)[torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    orders = [draw_order(labels, 0, draw) for draw in range(20)]
    for order in orders:
        assert order.shape == (3, 5) and len(order.unique()) == 15
        assert torch.equal(labels[order], torch.arange(3)[:, None].expand(3, 5))
    assert len({tuple(order.flatten().tolist()) for order in orders}) == 20
    assert torch.equal(orders[3], draw_order(labels, 0, 3)) and not torch.equal(orders[3], draw_order(labels, 1, 3))


def test_few_shot_rows_are_means_over_draws_with_students_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.nn.functional.one_hot(labels, 20).float() + 0.5 * torch.randn(300, 20, generator=generator)
    judge = fit_fewshot(features, labels, 3, shots=(1, 10), draws=5)
    answer = judge.answer(features)
    rows = answer.figures(Truth(labels, None, 3))
    for row, shots in zip(rows, (1, 10), strict=True):
        top1 = (answer.predicted[shots] == labels).float().mean(1).double().numpy()
        assert row["shots"] == shots and row["draws"] == len(top1) == 5
        half = 2.776445 * np.std(top1, ddof=1) / 5**0.5  # Student's t, 4 degrees of freedom, 97.5 %
        assert row["top1"] == pytest.approx(top1.mean()) and row["top1_high"] - row["top1"] == pytest.approx(half)
    assert rows[1]["top1"] > rows[0]["top1"] + 0.1
