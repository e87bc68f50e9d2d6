"""What every protocol has in common: a judge made from training images, its answers, and what these are measured by.

An answer is made without labels. Only when all answers of an encoder stand are the test labels read, once, and each
answer measured against them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

REPLICATES = 1000
LEVEL = 0.95

Figures = dict[str, Any]
"""Columns of one row of the table: numbers, and text where something needs saying."""


@dataclass(frozen=True)
class Truth:
    """The labels of the test images; made once, when all answers stand."""

    labels: Int64[Tensor, " m"]
    groups: np.ndarray | None
    """Group of each image (patient, slide, video), or None: what the bootstrap draws."""
    num_classes: int
    seed: int = 0
    """Of the bootstrap."""

    @cached_property
    def weights(self) -> np.ndarray:
        """(replicates, m): how often each image is drawn; whole groups where there are groups. One for all answers."""
        groups = np.arange(len(self.labels)) if self.groups is None else np.unique(self.groups, return_inverse=True)[1]
        units = int(groups.max()) + 1
        draws = np.random.default_rng(self.seed)
        counts = np.stack([np.bincount(draws.integers(units, size=units), minlength=units) for _ in range(REPLICATES)])
        return counts.astype(np.float32)[:, groups]

    def interval(self, values: Float[Tensor, " m"]) -> tuple[float, float]:
        """95 % bootstrap interval (percentiles) of the mean of a value that each image has."""
        weights = self.weights
        means = weights @ values.numpy().astype(np.float32) / weights.sum(axis=1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


@runtime_checkable
class Answer(Protocol):
    """What a judge says of the test images, before anybody has seen their labels."""

    def figures(self, truth: Truth) -> list[Figures]:
        """The rows that this answer earns; most earn one."""
        ...


@runtime_checkable
class Judge(Protocol):
    """What a protocol makes of the training images."""

    chosen: Figures
    """Hyperparameters and the validation accuracy they were chosen by; they become columns of the table."""

    def answer(self, features: Any) -> Answer:
        """Answer for the test images: from their (m, d) features, or from a stream of encoder outputs."""
        ...


@dataclass(frozen=True)
class Scores:
    """A score for each image and class; the highest counts, of equals the lower class."""

    scores: Float[Tensor, "m l"]

    def figures(self, truth: Truth) -> list[Figures]:
        """`top1` with `top1_low` and `top1_high`, `top5` where there are more classes, `balanced`, `confusion`."""
        return [classification(self.scores.cpu(), truth)]


def classification(scores: Float[Tensor, "m l"], truth: Truth) -> Figures:
    """What classification is measured by.

    Parameters
    ----------
    scores
        On the CPU; the highest of a row is its prediction.
    truth
        The labels.

    Returns
    -------
    dict
        `top1` in [0, 1] and its bootstrap interval; `top5` where there are more than five classes; `balanced`, the mean
        over the classes of the share that was recognised; `confusion` (true class, predicted class) as a nested list.
    """
    predicted = scores.argmax(dim=1)
    right = (predicted == truth.labels).float()
    low, high = truth.interval(right)
    found: Figures = {"top1": right.double().mean().item(), "top1_low": low, "top1_high": high}
    if scores.shape[1] > 5:
        five = scores.topk(5, dim=1).indices
        found["top5"] = (five == truth.labels[:, None]).any(dim=1).double().mean().item()
    table = confusion(truth.labels, predicted, truth.num_classes)
    count = table.sum(dim=1)
    found["balanced"] = (table.diagonal()[count > 0] / count[count > 0]).mean().item()
    return found | {"confusion": table.long().tolist()}


def confusion(
    labels: Int64[Tensor, " m"], predicted: Int64[Tensor, " m"], num_classes: int
) -> Float[Tensor, "{num_classes} {num_classes}"]:
    """How often images of each true class (row) were taken for each class (column)."""
    cells = (labels * num_classes + predicted).bincount(minlength=num_classes**2)
    return cells.view(num_classes, num_classes).double()
