"""k-NN against a naive loop, and its choice of k."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.errors import InputError
from clustermim.evaluation.knn import KS, fit_knn, neighbours, votes


def naive_knn(bank: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, k: int, classes: int) -> int:
    """One query, one image at a time, in Python floats."""
    unit = [[float(v) / math.hypot(*map(float, row)) for v in row] for row in bank]
    norm = math.hypot(*map(float, query))
    wanted = [float(v) / norm for v in query]
    similar = [sum(a * b for a, b in zip(row, wanted, strict=True)) for row in unit]
    order = sorted(range(len(unit)), key=lambda i: -similar[i])[:k]
    votes = [0.0] * classes
    for i in order:
        votes[int(labels[i])] += math.exp(similar[i] / 0.07)
    return max(range(classes), key=lambda c: votes[c])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(2, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_equals_a_naive_loop(n: int, m: int, classes: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Two dimensions at least: on a line every similarity is 1 or -1, all ties.
    bank, queries = torch.randn(n, dim + 1, generator=generator), torch.randn(m, dim + 1, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    for k in {1, min(5, n), n}:
        similarity, index = neighbours(bank, queries, k)
        found = votes(similarity, labels[index], classes).argmax(dim=1)
        assert found.tolist() == [naive_knn(bank, labels, q, k, classes) for q in queries]


def test_blocks_change_nothing() -> None:
    torch.manual_seed(0)
    bank, queries = torch.randn(50, 8), torch.randn(23, 8)
    whole, parts = neighbours(bank, queries, 7), neighbours(bank, queries, 7, at_once=120)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])
    assert (whole[0].diff(dim=1) <= 0).all()


def test_scale_of_features_does_not_matter_and_zero_vectors_do_no_harm() -> None:
    torch.manual_seed(0)
    bank, queries = torch.randn(20, 4), torch.randn(5, 4)
    scaled = bank * torch.logspace(-3, 3, 20)[:, None]
    assert torch.equal(neighbours(bank, queries, 5)[1], neighbours(scaled, queries, 5)[1])
    similarity, _ = neighbours(torch.zeros(3, 4), queries, 2)
    assert not similarity.any()


def test_k_is_chosen_on_validation_rows() -> None:
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    # Neighbours are informative only in numbers: each image is close to its class centre, with much noise.
    features = torch.randn(200, 30) + 0.35 * torch.where(labels == 0, 1.0, -1.0)[:, None]
    validation = torch.arange(200) % 5 == 0
    judge = fit_knn(features, labels, 2, validation)
    truth = labels[validation]
    scores = {}
    for k in KS:
        similarity, index = neighbours(features[~validation], features[validation], k)
        scores[k] = (votes(similarity, labels[~validation][index], 2).argmax(dim=1) == truth).double().mean().item()
    assert judge.chosen["val_top1"] == pytest.approx(max(scores.values()))
    assert judge.chosen["k"] == judge.k == next(k for k in KS if scores[k] == max(scores.values())) > 1
    assert torch.equal(judge.bank, features) and "note" not in judge.chosen


def test_k_larger_than_the_bank_is_left_out_and_told() -> None:
    torch.manual_seed(0)
    validation = torch.arange(15) % 5 == 0
    judge = fit_knn(torch.randn(15, 3), torch.arange(15) % 3, 3, validation)
    assert judge.k <= 12
    assert judge.chosen["note"] == "k = 20, 50 left out: k is chosen on a bank of 12 images"


@pytest.mark.parametrize("k", [0, 4])
def test_more_neighbours_than_there_are_cannot_be_asked_for(k: int) -> None:
    with pytest.raises(InputError, match="bank of 3 images"):
        neighbours(torch.randn(3, 2), torch.randn(1, 2), k)
