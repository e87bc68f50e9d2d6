"""What answers are measured by, against naive computations and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from clustermim.evaluation.judging import Truth, classification


def make_answer(n: int = 200, classes: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(n, generator=generator) ** 2 * classes).long()
    scores = torch.randn(n, classes, generator=generator)
    scores[torch.arange(n), labels] += 1
    return scores, labels


def test_figures_equal_scikit_learns() -> None:
    scores, labels = make_answer()
    found = classification(scores, Truth(labels, None, 8))
    y, predicted = labels.numpy(), scores.argmax(1).numpy()
    assert found["top1"] == pytest.approx((y == predicted).mean())
    assert found["top5"] == pytest.approx(top_k_accuracy_score(y, scores.numpy(), k=5))
    assert found["balanced"] == pytest.approx(balanced_accuracy_score(y, predicted))
    assert found["confusion"] == confusion_matrix(y, predicted, labels=range(8)).tolist()
    assert "top5" not in classification(scores[:, :4], Truth(labels % 4, None, 4))


def test_intervals_of_single_images_are_those_of_the_binomial() -> None:
    right = torch.arange(400) < 300
    low, high = Truth(torch.zeros(400, dtype=torch.long), None, 2).interval(right.float())
    spread = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert low == pytest.approx(0.75 - spread, abs=0.008) and high == pytest.approx(0.75 + spread, abs=0.008)


def test_groups_are_drawn_whole() -> None:
    """Forty copies of ten images say no more than ten images."""
    labels = torch.zeros(400, dtype=torch.long)
    right = (torch.arange(10) < 7).repeat_interleave(40).float()
    single, grouped = (Truth(labels, groups, 2).interval(right) for groups in (None, np.arange(400) // 40))
    assert grouped[1] - grouped[0] > 4 * (single[1] - single[0])
    weights = Truth(labels, np.arange(400) // 40, 2).weights
    assert (weights.reshape(1000, 10, 40).std(axis=2) == 0).all()
