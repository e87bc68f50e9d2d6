"""Nearest centroids of rows that were assigned before: only those near the row's first centroid are looked at.

While Lloyd's steps go on over the same rows, a row hardly ever leaves the surroundings of the centroid it was first
nearest to (its home). So each home lists the centroids near it, and its rows are compared with that list alone: the
cost of a step no longer grows with K. That is no bound (Elkan, "Using the triangle inequality to accelerate k-means",
ICML 2003, keeps exact ones; on image patches they skip little), so it serves where centroids are on their way, on
samples; what is told of centroids is measured against all of them.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clustermim.tokenizers.nearest import FitMetric, nearest_to
from clustermim.tokenizers.streams import BLOCK, RowsInMemory

LISTED = 64
"""Centroids near a home that its rows are compared with."""

_TILES = 64  # of rows, handled by one batched product
_LEAST_A_HOME = 100  # rows: below, tiles are mostly padding


class Neighbourhoods:
    """Assigns the same rows again and again to centroids that move little.

    Parameters
    ----------
    rows
        (N, D); the same at each call.
    """

    def __init__(self, rows: Float[Tensor, "n d"]) -> None:
        self._rows = rows
        self._homes: Tensor | None = None  # (K, D) the centroids of the first call
        self._tiles = torch.empty(0, dtype=torch.int64)
        self._home_of = torch.empty(0, dtype=torch.int64)

    @staticmethod
    def pay(data: RowsInMemory, k: int) -> bool:
        """Whether looking near by only is faster: lists much shorter than K, homes that fill tiles, and a CPU.

        The rows of all processes count, so that all do the same, and the same as one.
        """
        return data.rows.device.type == "cpu" and k >= 4 * LISTED and (data.num_rows or 0) >= _LEAST_A_HOME * k

    def assigned(self, centroids: Tensor, metric: FitMetric) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of the rows, with the nearest centroids of each."""
        ids = self.assign(centroids, metric)
        yield from zip(torch.split(self._rows, BLOCK), torch.split(ids, BLOCK), strict=True)

    def assign(self, centroids: Float[Tensor, "k d"], metric: FitMetric) -> Int64[Tensor, " n"]:
        """The nearest centroid of each row: among all at the first call, among those near its home later."""
        if self._homes is None:
            search = nearest_to(centroids, metric, self._rows[:BLOCK].mean(0))
            ids = torch.cat([search(part) for part in torch.split(self._rows, BLOCK)])
            self._homes = centroids.clone()
            self._lay_out(ids)
            return ids
        lists = self._lists(centroids)
        ids = torch.empty(len(self._rows), dtype=torch.int64)
        for tiles, home in self._batches():
            listed = lists[home]
            origin = self._homes[home][:, None] if metric == "l2" else self._rows.new_zeros(())
            near = centroids[listed] - origin
            half = near.square().sum(2).mul(-0.5) if metric == "l2" else near.new_zeros(near.shape[:2])
            scores = torch.baddbmm(half[:, None], self._rows[tiles] - origin, near.transpose(1, 2))
            ids[tiles] = listed.gather(1, scores.max(2).indices)
        return ids

    def _lists(self, centroids: Tensor) -> Int64[Tensor, "k listed"]:
        """The centroids nearest to each home, near first."""
        assert self._homes is not None
        return torch.cat(
            [
                torch.cdist(part, centroids).topk(LISTED, largest=False).indices
                for part in torch.split(self._homes, 1024)
            ]
        )

    def _lay_out(self, ids: Tensor) -> None:
        """Cut each home's rows into tiles of one size; the last of a home is filled up with its last row."""
        assert self._homes is not None
        k = len(self._homes)
        side = 128 if len(ids) >= 256 * k else 64
        order = ids.argsort(stable=True)
        counts = torch.bincount(ids, minlength=k)
        ends, tiles = counts.cumsum(0), (counts + side - 1) // side
        self._home_of = torch.repeat_interleave(torch.arange(k), tiles)
        inside = torch.arange(len(self._home_of)) - (tiles.cumsum(0) - tiles)[self._home_of]
        begins = (ends - counts)[self._home_of] + side * inside
        places = torch.minimum(begins[:, None] + torch.arange(side), ends[self._home_of][:, None] - 1)
        self._tiles = order[places]

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(torch.split(self._tiles, _TILES), torch.split(self._home_of, _TILES), strict=True)
