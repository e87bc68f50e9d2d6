"""Clustering: K-means without labels, as many clusters as classes; how well these are the classes.

K-means sees the training images only, its clusters are then those nearest to each test image. Accuracy is that of the
best one-to-one matching of clusters and classes (Hungarian method), as is usual; beside it the normalised mutual
information (arithmetic mean) and the adjusted Rand index, which need no matching.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor
from torch.nn import functional

from clustermim.evaluation.judging import Figures, Truth, confusion

STARTS = 5


@dataclass(frozen=True)
class Clusters:
    """The cluster of each test image."""

    assigned: Int64[Tensor, " m"]

    def figures(self, truth: Truth) -> list[Figures]:
        """`accuracy` of the best matching, with the bootstrap interval of this matching; `nmi`; `ari`."""
        match = best_matching(self.assigned, truth.labels, truth.num_classes)
        right = (match[self.assigned] == truth.labels).float()
        low, high = truth.interval(right)
        labels, assigned = truth.labels.numpy(), self.assigned.numpy()
        found: Figures = {"accuracy": right.double().mean().item(), "accuracy_low": low, "accuracy_high": high}
        found["nmi"] = float(normalized_mutual_info_score(labels, assigned))
        return [found | {"ari": float(adjusted_rand_score(labels, assigned))}]


def best_matching(
    assigned: Int64[Tensor, " m"], labels: Int64[Tensor, " m"], num_classes: int
) -> Int64[Tensor, "{num_classes}"]:
    """The class of each cluster in the one-to-one matching that gets most images right (Kuhn 1955)."""
    table = confusion(assigned, labels, num_classes).numpy()
    clusters, classes = linear_sum_assignment(table, maximize=True)
    match = np.empty(num_classes, dtype=np.int64)
    match[clusters] = classes
    return torch.from_numpy(match)


class ClusterJudge:
    """Centroids on the unit sphere."""

    def __init__(self, centroids: Float[Tensor, "k d"], inertia: float) -> None:
        self.centroids = centroids
        self.chosen: Figures = {"inertia": inertia}

    def answer(self, features: Float[Tensor, "m d"]) -> Clusters:
        """The nearest centroid of each row."""
        return Clusters(torch.cdist(functional.normalize(features, dim=1), self.centroids).argmin(dim=1).cpu())


def fit_clusters(features: Float[Tensor, "n d"], num_classes: int, seed: int = 0) -> ClusterJudge:
    """K-means on unit-length features, the best of five starts by inertia; no label is seen.

    Parameters
    ----------
    features
        Of the training images.
    num_classes
        Clusters to make.
    seed
        Of the starts.
    """
    unit = functional.normalize(features, dim=1).cpu().numpy()
    model = KMeans(num_classes, n_init=STARTS, random_state=seed).fit(unit)
    return ClusterJudge(torch.from_numpy(model.cluster_centers_).to(features), float(model.inertia_) / len(unit))
