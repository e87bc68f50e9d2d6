"""k-NN on frozen features: cosine similarity, votes weighted by exp(similarity / 0.07), k chosen on part of train.

The protocol of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018, as
used by DINO and after, except that k is chosen without the test images.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from clustermim.errors import InputError
from clustermim.evaluation.judging import Scores

KS = (1, 5, 10, 20, 50)
TEMPERATURE = 0.07

_SIMILARITIES = 1 << 26
"""Similarities held at a time (256 MB)."""


def neighbours(
    bank: Float[Tensor, "n d"], queries: Float[Tensor, "m d"], k: int, *, at_once: int = _SIMILARITIES
) -> tuple[Float[Tensor, "m {k}"], Int64[Tensor, "m {k}"]]:
    """The k most similar rows of the bank for each query, the most similar first.

    Parameters
    ----------
    bank, queries
        Features; they are scaled to unit length here. A zero vector is similar to nothing.
    k
        How many; at most the rows of the bank.
    at_once
        Similarities held in memory at a time: queries are taken in blocks.

    Returns
    -------
    tuple
        Cosine similarities and row numbers. Equal similarities are taken as `torch.topk` takes them.

    Raises
    ------
    InputError
        k is larger than the bank, or below 1.
    """
    if not 1 <= k <= len(bank):
        raise InputError(f"k = {k} neighbours cannot be found in a bank of {len(bank)} images: k is 1 to {len(bank)}.")
    bank = torch.nn.functional.normalize(bank, dim=1)
    block = max(1, at_once // len(bank))
    similarity = queries.new_empty(len(queries), k)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), block):
        part = torch.nn.functional.normalize(queries[start : start + block], dim=1)
        top = (part @ bank.T).topk(k, dim=1)
        similarity[start : start + block], index[start : start + block] = top.values, top.indices
    return similarity, index


def votes(
    similarity: Float[Tensor, "m k"],
    labels: Int64[Tensor, "m k"],
    num_classes: int,
    temperature: float = TEMPERATURE,
) -> Float[Tensor, "m {num_classes}"]:
    """The sum of exp(similarity / temperature) over the neighbours of each class, relative to the nearest neighbour's.

    Parameters
    ----------
    similarity, labels
        Of each query's neighbours.
    num_classes
        Classes are 0 to `num_classes - 1`.
    temperature
        The smaller, the more the nearest neighbours count.
    """
    # Relative to the nearest neighbour, so that exp cannot overflow; float64, so that the order of sums hardly matters.
    weights = ((similarity.double() - similarity[:, :1].double()) / temperature).exp()
    return weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)


class KNNJudge:
    """A bank of labelled features that names the class of others."""

    def __init__(
        self, bank: Float[Tensor, "n d"], labels: Int64[Tensor, " n"], num_classes: int, k: int, chosen: dict[str, Any]
    ) -> None:
        self.bank, self.labels, self.num_classes, self.k = bank, labels, num_classes, k
        self.chosen = chosen

    def answer(self, features: Float[Tensor, "m d"]) -> Scores:
        """The votes for each row."""
        similarity, index = neighbours(self.bank, features, self.k)
        return Scores(votes(similarity, self.labels[index], self.num_classes))


def fit_knn(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    validation: Bool[Tensor, " n"],
    *,
    ks: Sequence[int] = KS,
) -> KNNJudge:
    """Choose k on the validation rows of train, then take all of train as the bank.

    Parameters
    ----------
    features, labels
        Of the training images.
    num_classes
        Number of classes.
    validation
        True for the rows that k is chosen on; the others are the bank meanwhile.
    ks
        Candidates; those larger than the bank are left out, and the result says so. Of equals the first wins.

    Returns
    -------
    KNNJudge
        `chosen` holds `k`, `val_top1` and, where candidates were left out, a `note`.
    """
    bank, bank_labels = features[~validation], labels[~validation]
    usable = [k for k in ks if k <= len(bank)] or [len(bank)]
    similarity, index = neighbours(bank, features[validation], max(usable))
    truth = labels[validation]
    found = {
        k: (votes(similarity[:, :k], bank_labels[index[:, :k]], num_classes).argmax(dim=1) == truth)
        .double()
        .mean()
        .item()
        for k in usable
    }
    best = max(usable, key=lambda k: found[k])
    chosen: dict[str, Any] = {"val_top1": found[best], "k": best, "temperature": TEMPERATURE}
    dropped = [k for k in ks if k not in usable]
    if dropped:
        chosen["note"] = f"k = {', '.join(map(str, dropped))} left out: k is chosen on a bank of {len(bank)} images"
    return KNNJudge(features, labels, num_classes, best, chosen)
