"""A table of centroids and the one question asked of it: which is nearest?

The nearest centroid under squared distance maximises x·c − ½|c|², so assignment is one matrix product and an argmax, in
blocks that stay in cache. Both sides are shifted by the (coarsely rounded) mean centroid first: distances do not
change, but the products become small and float32 keeps the digits that tell near centroids apart.
"""

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from clustermim.errors import InputError, nearest

Metric = Literal["l2", "cosine", "dot"]

_CPU_SCORES = 1 << 19  # scores alive at once: 2 MB, what a core's cache holds
_DEVICE_SCORES = 1 << 26
_GROUPED_FROM = 512  # from this many centroids on, the argmax in two steps pays on a CPU


class Assigner:
    """Assigns rows to the nearest of fixed centroids; the products that depend on centroids alone are made once.

    Parameters
    ----------
    centroids
        (K, D) float, on the device where rows will come.
    metric
        ``"l2"``: least distance. ``"cosine"`` and ``"dot"``: largest inner product (for ``"cosine"`` the centroids are
        taken as unit vectors; the length of a row does not matter to its token).
    """

    def __init__(self, centroids: Float[Tensor, "k d"], metric: Metric = "l2") -> None:
        self.size, self.dim = centroids.shape
        self.metric = metric
        self.device = centroids.device
        c = centroids.float()
        self.shift = torch.zeros(self.dim, device=c.device)
        if metric == "l2":
            self.shift = _coarse_mean(c)
            c = c - self.shift
            c = torch.cat([c, -0.5 * c.square().sum(1, keepdim=True)], 1)
        self.group = _group(self.size) if c.device.type == "cpu" and self.size >= _GROUPED_FROM else 0
        if self.group:
            c = self._interleaved(c)
        self._columns = c.t().contiguous()
        budget = _CPU_SCORES if c.device.type == "cpu" else _DEVICE_SCORES
        self.rows = min(max(budget // c.shape[0], 128), 16384 if c.device.type == "cpu" else 1 << 20)

    def _interleaved(self, c: Float[Tensor, "k e"]) -> Float[Tensor, "padded e"]:
        """Order the centroids so that a group of neighbours is spread at a fixed stride: its maximum vectorises."""
        groups = math.ceil(self.size / self.group)
        padding = c.new_zeros(groups * self.group - self.size, c.shape[1])
        if self.metric == "l2":
            padding[:, -1] = -math.inf  # never the nearest
        elif len(padding):
            padding = c[-1:].expand_as(padding)  # a tie with the last centroid, which has the lower id
        return torch.cat([c, padding]).view(groups, self.group, -1).transpose(0, 1).reshape(-1, c.shape[1])

    def blocks(self, x: Float[Tensor, "n d"]) -> Iterator[tuple[slice, Float32[Tensor, "rows e"]]]:
        """Cut rows into blocks that fit the cache, shifted and with a column of ones for the −½|c|² term."""
        rows = min(self.rows, max(len(x), 1))
        buffer = torch.ones(rows, self.dim + 1, device=x.device) if self.metric == "l2" else None
        for start in range(0, len(x), rows):
            block = x[start : start + rows]
            if buffer is not None:
                filled = buffer[: len(block)]
                torch.sub(block, self.shift, out=filled[:, :-1])
                block = filled
            yield slice(start, start + len(block)), block.float()

    def __call__(self, x: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        """The id of the nearest centroid of each row; a tie goes to the lower id."""
        ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
        scores = torch.empty(min(self.rows, max(len(x), 1)), self._columns.shape[1], device=x.device)
        order = torch.arange(len(scores), device=x.device) if self.group else None
        for where, block in self.blocks(x):
            found = torch.mm(block, self._columns, out=scores[: len(block)])
            if order is None:
                ids[where] = found.max(1).indices
                continue
            # First the best group, then the best in it: `max` with indices is slow, `amax` is fast. The first maximum
            # in each step is that of the lower ids, so ties still go to the lower id.
            spread = found.view(len(block), self.group, -1)
            best = spread.amax(1).max(1).indices
            ids[where] = best * self.group + spread[order[: len(block)], :, best].max(1).indices
        return ids


def _coarse_mean(c: Float[Tensor, "k d"]) -> Float[Tensor, " d"]:
    """The mean, rounded to a power of two near the spread: whole numbers stay exact, so that exact ties remain ties."""
    mean = c.mean(0)
    spread = float((c - mean).square().mean().sqrt())
    step = 2.0 ** math.floor(math.log2(spread)) if spread > 0.0 else 1.0
    return (mean / step).round() * step


def _group(size: int) -> int:
    """A power of two near √K: groups and group size are then alike, and both searches short."""
    return 1 << round(math.log2(size) / 2)


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

        Computed in float32 whatever autocast says, in memory that does not grow with n beyond the result.

        Raises
        ------
        InputError
            The rows have another number of features than the centroids.
        """
        self._check(x)
        with torch.autocast(x.device.type, enabled=False):
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
