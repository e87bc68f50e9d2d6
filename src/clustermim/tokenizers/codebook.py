"""A table of centroids as a part of a tokenizer: checked, saved, moved, and asked which of them is nearest."""

from typing import get_args

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from clustermim.errors import InputError, nearest
from clustermim.tokenizers.assigning import Assigner as Assigner
from clustermim.tokenizers.assigning import Metric as Metric


class Codebook(nn.Module):
    """K centroids with a metric.

    Parameters
    ----------
    centroids
        (K, D) float; for ``"cosine"`` they are scaled to unit length.
    metric
        ``"l2"``, ``"cosine"`` (spherical K-means) or ``"dot"`` (only to replay imported centroids).

    Raises
    ------
    InputError
        The table is empty, holds NaN or infinity, or the metric is unknown.
    """

    centroids: Tensor

    def __init__(self, centroids: Float[Tensor, "k d"], metric: Metric = "l2") -> None:
        super().__init__()
        if metric not in get_args(Metric):
            raise InputError(f"Codebook metric {metric!r} is unknown.{nearest(metric, get_args(Metric))}")
        if centroids.numel() == 0:
            raise InputError(f"A codebook needs at least one centroid; this table has shape {tuple(centroids.shape)}.")
        if not bool(torch.isfinite(centroids).all()):
            raise InputError("The centroids hold NaN or infinity; fit or import them again.")
        if metric == "cosine":
            centroids = unit_rows(centroids)
        self.metric: Metric = metric
        self.register_buffer("centroids", centroids.detach().float().clone())
        self._prepared: tuple[tuple[object, ...], Assigner] | None = None

    @property
    def size(self) -> int:
        """K, the number of centroids."""
        return self.centroids.shape[0]

    @property
    def dim(self) -> int:
        """D, the number of features."""
        return self.centroids.shape[1]

    def assigner(self) -> Assigner:
        """The prepared search over the present centroids; made again when they change or move."""
        key = (self.centroids.data_ptr(), self.centroids._version, self.centroids.device)
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = (key, Assigner(self.centroids, self.metric))
        return self._prepared[1]

    def __getstate__(self) -> dict[str, object]:
        """Leave the prepared search out of copies and pickles: it is made again where it is needed."""
        return {**self.__dict__, "_prepared": None}

    @torch.no_grad()
    def assign(self, x: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        """The id of the nearest centroid of each row, in [0, K); a tie goes to the lower id.

        Exact for float32 rows, whatever autocast says, in memory that does not grow with n beyond the result.

        Raises
        ------
        InputError
            The rows have another number of features than the centroids.
        """
        self._check(x)
        return self.assigner()(x.float())

    @torch.no_grad()
    def distances(self, x: Float[Tensor, "n d"]) -> Float32[Tensor, "n k"]:
        """All n·K distances of rows to centroids: squared Euclidean, 1 − cosine, or minus the inner product."""
        self._check(x)
        with torch.autocast(x.device.type, enabled=False):
            x, c = x.float(), self.centroids
            if self.metric == "dot":
                return -(x @ c.t())
            if self.metric == "cosine":
                return 1.0 - unit_rows(x) @ c.t()
            x, c = x - c.mean(0), c - c.mean(0)
            squares = x.square().sum(1, keepdim=True) + c.square().sum(1) - 2.0 * x @ c.t()
            return squares.clamp_min(0.0)

    def _check(self, x: Tensor) -> None:
        if x.shape[1] != self.dim:
            raise InputError(
                f"These patches have {x.shape[1]} features, the codebook's centroids {self.dim}. "
                "Use the features with which the codebook was fitted."
            )


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Scale each row to unit length; a row of zeros stays zero."""
    return nn.functional.normalize(x.float(), dim=1, eps=1e-12)
