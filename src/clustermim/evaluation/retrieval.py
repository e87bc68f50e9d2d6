"""Retrieval: each test image ranks the training images by cosine similarity; mean average precision, no training."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from clustermim.evaluation.judging import Figures, Truth

_AT_ONCE = 1 << 25
"""Similarities sorted at a time."""


@dataclass(frozen=True)
class Ranking:
    """Features of the gallery and of the queries; ranked block by block when measured, as the whole would not fit."""

    gallery: Float[Tensor, "n d"]
    labels: Int64[Tensor, " n"]
    queries: Float[Tensor, "m d"]

    def figures(self, truth: Truth) -> list[Figures]:
        """`map`, the mean average precision in [0, 1], and its bootstrap interval over the queries."""
        precision = average_precision(self.gallery, self.labels, self.queries, truth.labels)
        low, high = truth.interval(precision.float())
        return [{"map": precision.mean().item(), "map_low": low, "map_high": high}]


def average_precision(
    gallery: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    queries: Float[Tensor, "m d"],
    wanted: Int64[Tensor, " m"],
    *,
    at_once: int = _AT_ONCE,
) -> Float[Tensor, " m"]:
    """Average precision of each query's ranking of the whole gallery.

    The mean, over the gallery images of the query's class, of the precision at that image's rank. Images of equal
    similarity are ranked in the gallery's order.

    Parameters
    ----------
    gallery, labels
        Unit-length features and their classes.
    queries, wanted
        Unit-length features and the classes that count as found.
    at_once
        Similarities held at a time.

    Returns
    -------
    Tensor
        float64 on the CPU; 0 for a class that the gallery does not have.
    """
    ranks = torch.arange(1, len(gallery) + 1, device=gallery.device, dtype=torch.float32)
    wanted = wanted.to(gallery.device)
    found = []
    block = max(1, at_once // len(gallery))
    for start in range(0, len(queries), block):
        order = (queries[start : start + block] @ gallery.T).argsort(dim=1, descending=True, stable=True)
        hits = (labels[order] == wanted[start : start + block, None]).float()
        precision = hits.cumsum(dim=1) / ranks * hits
        found.append(precision.double().sum(dim=1) / hits.double().sum(dim=1).clamp(min=1))
    return torch.cat(found).cpu()


class RetrievalJudge:
    """A gallery of training images."""

    def __init__(self, gallery: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> None:
        self.gallery, self.labels = functional.normalize(gallery, dim=1), labels
        self.chosen: Figures = {}

    def answer(self, features: Float[Tensor, "m d"]) -> Ranking:
        """The queries beside the gallery."""
        return Ranking(self.gallery, self.labels, functional.normalize(features, dim=1))
