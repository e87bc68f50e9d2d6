"""A codebook so large that a search through all of it would cost too much: cells, and centroids inside each cell.

About √K coarse centroids part the space into cells; each fine centroid belongs to one cell (an inverted file, as in
Jégou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search", PAMI 2011, section IV). A row is compared
with all coarse centroids, then with the fine ones of the `probes` nearest cells: some √K + probes·√K products instead
of K. With more probes the nearest of all is missed less often; with as many as there are cells, never.

Ids are exact for the cells searched: they are chosen, and searched, as if in exact arithmetic (see `assigning`), so
batches, threads and devices change nothing.
"""

import itertools

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clustermim.errors import InputError
from clustermim.tokenizers.assigning import Assigner, Metric
from clustermim.tokenizers.codebook import Codebook

DEFAULT_PROBES = 4
"""Cells that are searched; `benchmarks/large_vocabulary.py` draws error against speed for others."""

_PAIRS = 1 << 19  # of row and cell, sorted by cell at once: enough that each cell gets a product worth starting
_NUMBERS = 1 << 25  # floats of their rows, at most


class TwoLevelCodebook(Codebook):
    """K centroids in C cells, of which a row's `probes` nearest are searched.

    Parameters
    ----------
    centroids
        (K, D) float, cell after cell.
    coarse
        (C, D) float, the cells' own centroids.
    offsets
        (C + 1,) int64: cell i owns the centroids offsets[i] to offsets[i + 1] − 1; no cell is empty.
    metric
        ``"l2"`` or ``"cosine"``.
    probes
        Cells searched for a row, in [1, C]; more are slower and nearer to the full search. May be set at any time.
        None takes 4, or all where there are fewer.

    Raises
    ------
    InputError
        As for `Codebook`; or the metric is ``"dot"``, or `offsets` do not part the centroids into C cells.
    """

    coarse: Tensor
    offsets: Tensor

    def __init__(
        self,
        centroids: Float[Tensor, "k d"],
        coarse: Float[Tensor, "c d"],
        offsets: Int64[Tensor, " c1"],
        metric: Metric = "l2",
        probes: int | None = None,
    ) -> None:
        super().__init__(centroids, metric)
        if metric == "dot":
            raise InputError("Two levels need the metric l2 or cosine: an inner product has no cells.")
        table = Codebook(coarse, metric)
        self.register_buffer("coarse", table.centroids)
        self.register_buffer("offsets", offsets.detach().clone())
        self._check_cells()
        self.probes = min(DEFAULT_PROBES, self.num_cells) if probes is None else probes
        self._cells: tuple[tuple[object, ...], Assigner, list[Assigner]] | None = None

    @classmethod
    def empty(cls, k: int, cells: int, dim: int, metric: Metric, probes: int) -> "TwoLevelCodebook":
        """One of these sizes, whose state is loaded afterwards."""
        if not 1 <= cells <= k:
            raise InputError(f"A codebook of {k} centroids cannot have {cells} cells; fit the tokenizer again.")
        offsets = torch.cat([torch.arange(cells), torch.tensor([k])])
        return cls(torch.zeros(k, dim), torch.zeros(cells, dim), offsets, metric, probes)

    @property
    def num_cells(self) -> int:
        """C."""
        return len(self.coarse)

    @property
    def probes(self) -> int:
        """Cells searched for a row."""
        return self._probes

    @probes.setter
    def probes(self, probes: int) -> None:
        if not 1 <= probes <= self.num_cells:
            raise InputError(f"probes = {probes} is out of range: this codebook has {self.num_cells} cells.")
        self._probes = probes

    def _check_cells(self) -> None:
        o = self.offsets
        if len(o) != len(self.coarse) + 1 or int(o[0]) != 0 or int(o[-1]) != self.size or bool((o.diff() < 1).any()):
            raise InputError("The offsets of this two-level codebook do not part its centroids into cells; fit again.")

    def _searches(self) -> tuple[Assigner, list[Assigner]]:
        """The prepared searches: over the cells, and inside each."""
        tables = (self.centroids, self.coarse, self.offsets)
        key = tuple((table.data_ptr(), table._version, table.device) for table in tables)
        if self._cells is None or self._cells[0] != key:
            self._check_cells()
            bounds = self.offsets.tolist()
            parts = [self.centroids[a:b] for a, b in itertools.pairwise(bounds)]
            inside = [Assigner(part, self.metric, "float32") for part in parts]
            self._cells = (key, Assigner(self.coarse, self.metric), inside)
        return self._cells[1], self._cells[2]

    def __getstate__(self) -> dict[str, object]:
        """Leave the prepared searches out of copies and pickles."""
        return {**super().__getstate__(), "_cells": None}

    @torch.no_grad()
    def assign(self, x: Float[Tensor, "n d"], probes: int | None = None) -> Int64[Tensor, " n"]:
        """The id of the nearest centroid in the nearest cells, in [0, K); a tie goes to the lower id.

        Parameters
        ----------
        x
            (n, D) rows.
        probes
            Cells to search; None takes the codebook's own number.

        Raises
        ------
        InputError
            The rows have another number of features than the centroids, or `probes` is not in [1, C].
        """
        self._check(x)
        probes = self.probes if probes is None else probes
        if not 1 <= probes <= self.num_cells:
            raise InputError(f"probes = {probes} is out of range: this codebook has {self.num_cells} cells.")
        rows = max(min(_PAIRS, _NUMBERS // self.dim) // probes, 1024)
        with torch.autocast(x.device.type, enabled=False):
            found = [self._assign_block(block.float(), probes) for block in torch.split(x, rows)]
        return torch.cat(found)

    def _assign_block(self, x: Float[Tensor, "n d"], probes: int) -> Int64[Tensor, " n"]:
        over_cells, inside = self._searches()
        if not len(x):
            return torch.zeros(0, dtype=torch.int64, device=x.device)
        cells = over_cells.nearest(x, probes)
        order = cells.flatten().argsort(stable=True)
        row = order // probes  # pairs of row and cell, cell after cell
        bounds = [0, *torch.bincount(cells.flatten(), minlength=self.num_cells).cumsum(0).tolist()]
        sorted_rows = x.index_select(0, row)
        candidate = torch.empty(len(row), dtype=torch.int64, device=x.device)
        starts = self.offsets.tolist()
        for cell, search in enumerate(inside):
            start, end = bounds[cell], bounds[cell + 1]
            if start < end:
                candidate[start:end] = search(sorted_rows[start:end]) + starts[cell]
        if probes == 1:
            ids = torch.empty_like(candidate)
            ids[row] = candidate
            return ids
        return self._nearest_of_probes(sorted_rows, row, candidate, len(x), probes)

    def _nearest_of_probes(
        self, x: Float[Tensor, "pairs d"], row: Tensor, candidate: Tensor, n: int, probes: int
    ) -> Int64[Tensor, " n"]:
        """For each row the best of its candidates: by float32 differences, and where those nearly tie, in float64."""
        c = self.centroids.index_select(0, candidate)
        if self.metric == "l2":
            distance = (x - c).square_().sum(1)
            share, lost = (self.dim + 8) * 2.0**-22, 1e-37
        else:
            distance = -(x * c).sum(1)
            share, lost = 0.0, (self.dim + 8) * 2.0**-22
            distance = distance / torch.linalg.vector_norm(x, dim=1).clamp_min(1e-37)
        pairs = row.argsort(stable=True).view(n, probes)
        table, ids = distance[pairs], candidate[pairs]
        best, winner = table.min(1)
        found = ids.gather(1, winner[:, None])[:, 0]
        near = table <= (best * (1.0 + share) + lost)[:, None]
        unsure = ((near.sum(1) != 1) | ~torch.isfinite(best)).nonzero()[:, 0]
        if len(unsure):
            exact = Assigner.exact_distances(x[pairs[unsure, 0]], self.centroids[ids[unsure]], self.metric)
            least = exact.amin(1, keepdim=True)
            again = torch.where(exact <= least, ids[unsure], self.size).amin(1)
            found[unsure] = torch.where(again < self.size, again, ids[unsure].amin(1))
        return found
