"""From token counts to class matrices: everything a score needs is a sum over tokens, so it is summed in blocks.

Notation (docs/theory.md): R[i, c] patches with token i in images of class c, r_i = Σ_c R[i, c], n_c = Σ_i R[i, c],
n = Σ n_c, p_c = n_c / n, Q[c, i] = R[i, c] / n_c, T[i, c] = R[i, c] / r_i. With folds, R_f is the table of fold f,
O_f = R − R_f that of the other folds, and T_f comes from O_f.

All sums are made for a block of weightings at once: one weighting (all ones) is the score itself, a thousand are a
bootstrap. Tokens that occur in a single row (a single image) never join two rows, whatever the weights, so their
terms have closed forms in four numbers of that row; that is what makes one-token-per-patch vocabularies cheap.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy import sparse
from scipy.special import xlogy

from clustermim.scoring.counts import RowCounts

# Doubles in one block of R: about what the second-level cache of a core holds a few of.
BLOCK = 1 << 19


@dataclass(kw_only=True)
class TokenSums:
    """Sums over tokens, for each of B weightings of the rows. L classes, F folds (1 without cross-fitting)."""

    sizes: Float64[np.ndarray, "b f l"]
    """Patches of each class in each fold."""
    joined: Float64[np.ndarray, "b l l"]
    """Σ_i R_ic R_ic' / r_i."""
    rows: Float64[np.ndarray, "b l l"]
    """Σ_i T_ic T_ic'."""
    gram: Float64[np.ndarray, "b l l"]
    """Σ_i R_ic R_ic'."""
    used: Float64[np.ndarray, " b"]
    """Tokens with r_i > 0."""
    majority: Float64[np.ndarray, " b"]
    """Σ_i max_c R_ic."""
    token_log: Float64[np.ndarray, " b"]
    """Σ_i r_i log r_i."""
    cell_log: Float64[np.ndarray, " b"]
    """Σ_ic R_ic log R_ic."""
    cross: Float64[np.ndarray, "b l l"] | None
    """Mean over the folds f that hold class c of Σ_i Q_f[c, i] T_f[i, c'], a row c each."""
    cross_rows: Float64[np.ndarray, "b l l"] | None
    """Mean over folds of Σ_i (R_f[i, c] / r_f[i]) T_f[i, c']."""
    cross_gram: Float64[np.ndarray, "b l l"] | None
    """Σ_f Σ_i R_f[i, c] O_f[i, c'], the pairs of `gram` that no image makes with itself."""

    @property
    def class_sizes(self) -> Float64[np.ndarray, "b l"]:
        """n_c."""
        return np.asarray(self.sizes.sum(axis=1))

    @property
    def prior(self) -> Float64[np.ndarray, "b l"]:
        """p_c."""
        sizes = self.class_sizes
        return np.asarray(sizes / sizes.sum(axis=1, keepdims=True))


class TokenSummer:
    """Makes `TokenSums` of one `RowCounts` under many weightings of its rows; preparation is done once.

    The class prior that stands in for a token unseen in the other folds is p_c over *all* folds under the same
    weights, the same p_c that S = D_p^½ C D_p^−½ uses. So tokens that never recur between images give C = 1·pᵀ, and
    an alignment of 0, exactly, under every weighting.
    """

    def __init__(self, counts: RowCounts) -> None:
        self.classes = counts.num_classes
        self.folds = max(1, counts.num_folds)
        self.crossfit = counts.num_folds > 0
        self.num_rows = counts.matrix.shape[0]
        cells = counts.row_fold * self.classes + counts.row_class
        self._mass = sparse.csr_matrix(
            (np.asarray(counts.matrix.sum(axis=1)).ravel(), (np.arange(self.num_rows), cells)),
            shape=(self.num_rows, self.folds * self.classes),
        )
        columns = counts.matrix.tocsc()
        alone = np.diff(columns.indptr) == 1
        self._prepare_alone(columns[:, alone], cells)
        shared = columns[:, ~alone]
        self._shared_tokens = shared.shape[1]
        by_row = shared.tocsr()
        self._cell_rows = [np.flatnonzero(cells == cell) for cell in range(self.folds * self.classes)]
        # One (tokens, rows of the cell) matrix a cell: token blocks are then row slices.
        self._cell_matrices = [by_row[rows].T.tocsr() for rows in self._cell_rows]
        self._slices: dict[int, list[list[sparse.csr_matrix]]] = {}

    def _prepare_alone(self, columns: sparse.csc_matrix, cells: np.ndarray) -> None:
        values, rows = columns.data, columns.indices
        where = (rows, cells[rows])
        shape = (self.num_rows, self.folds * self.classes)

        def summed(terms: np.ndarray) -> sparse.csr_matrix:
            return sparse.coo_matrix((terms, where), shape=shape).tocsr()

        self._any_alone = len(values) > 0
        self._alone_number = summed(np.ones_like(values))
        self._alone_mass = summed(values)
        self._alone_squares = summed(values**2)
        self._alone_logs = summed(xlogy(values, values))

    def sums(self, weights: Float64[np.ndarray, "b rows"]) -> TokenSums:
        """The sums under each weighting of the rows; weights ≥ 0."""
        b, f, l = len(weights), self.folds, self.classes  # noqa: E741 - the letters of the formulas
        sizes = np.asarray(weights @ self._mass).reshape(b, f, l)
        sums = TokenSums(
            sizes=sizes,
            joined=np.zeros((b, l, l)),
            rows=np.zeros((b, l, l)),
            gram=np.zeros((b, l, l)),
            used=np.zeros(b),
            majority=np.zeros(b),
            token_log=np.zeros(b),
            cell_log=np.zeros(b),
            cross=np.zeros((b, l, l)) if self.crossfit else None,
            cross_rows=np.zeros((b, l, l)) if self.crossfit else None,
            cross_gram=np.zeros((b, l, l)) if self.crossfit else None,
        )
        cross = _CrossSums.zeros(sizes) if self.crossfit else None
        if self._any_alone:
            self._add_alone(sums, cross, weights)
        for table in self._tables(weights):
            _add_table(sums, table.sum(axis=0))
            if cross is not None:
                cross.add_table(table)
        if cross is not None:
            sums.cross, sums.cross_rows = cross.finish(sums.prior)
            sums.cross_gram = cross.gram
        return sums

    def _tables(self, weights: np.ndarray) -> Iterator[Float64[np.ndarray, "f b l k"]]:
        """The table R_f[i, c] of each weighting, a block of shared tokens at a time."""
        b, cells = len(weights), self.folds * self.classes
        step = max(16, BLOCK // (cells * b))
        if step not in self._slices:
            starts = range(0, self._shared_tokens, step)
            self._slices[step] = [[m[s : s + step] for m in self._cell_matrices] for s in starts]
        per_cell = [np.ascontiguousarray(weights[:, rows].T) for rows in self._cell_rows]
        for block in self._slices[step]:
            width = block[0].shape[0]
            table = np.empty((self.folds, b, self.classes, width))
            for cell, (matrix, cell_weights) in enumerate(zip(block, per_cell, strict=True)):
                table[cell // self.classes, :, cell % self.classes] = (matrix @ cell_weights).T
            yield table

    def _add_alone(self, sums: TokenSums, cross: "_CrossSums | None", weights: np.ndarray) -> None:
        b, f, l = sums.sizes.shape  # noqa: E741
        number = np.asarray((weights > 0) @ self._alone_number).reshape(b, f, l)
        mass = np.asarray(weights @ self._alone_mass).reshape(b, f, l)
        squares = np.asarray(weights**2 @ self._alone_squares).reshape(b, f, l)
        # w·m·log(w·m) = w·(m log m) + (w log w)·m
        logs = np.asarray(weights @ self._alone_logs).sum(axis=1) + np.asarray(
            xlogy(weights, weights) @ self._alone_mass
        ).sum(axis=1)
        diagonal = np.arange(l)
        sums.joined[:, diagonal, diagonal] += mass.sum(axis=1)
        sums.rows[:, diagonal, diagonal] += number.sum(axis=1)
        sums.gram[:, diagonal, diagonal] += squares.sum(axis=1)
        sums.used += number.sum(axis=(1, 2))
        sums.majority += mass.sum(axis=(1, 2))
        sums.token_log += logs
        sums.cell_log += logs
        if cross is not None:
            cross.unseen += mass.transpose(1, 0, 2)
            cross.unseen_rows += number.sum(axis=1)


def _add_table(sums: TokenSums, table: Float64[np.ndarray, "b l k"]) -> None:
    tokens = table.sum(axis=1)
    shares = _rows_scaled(table, tokens)
    turned = table.transpose(0, 2, 1)
    sums.joined += shares @ turned
    sums.rows += shares @ shares.transpose(0, 2, 1)
    sums.gram += table @ turned
    sums.used += (tokens > 0).sum(axis=1)
    sums.majority += table.max(axis=1).sum(axis=1)
    sums.token_log += xlogy(tokens, tokens).sum(axis=1)
    sums.cell_log += xlogy(table, table).sum(axis=(1, 2))


@dataclass(kw_only=True)
class _CrossSums:
    """Sums that pair each fold with the others; f is leading, so that a fold is one contiguous block."""

    sizes: Float64[np.ndarray, "f b l"]
    walk: Float64[np.ndarray, "b l l"]
    unseen: Float64[np.ndarray, "f b l"]
    """Patches of each class whose token the other folds never saw."""
    rows: Float64[np.ndarray, "b l l"]
    unseen_rows: Float64[np.ndarray, "b l"]
    gram: Float64[np.ndarray, "b l l"]

    @classmethod
    def zeros(cls, sizes: Float64[np.ndarray, "b f l"]) -> "_CrossSums":
        b, f, l = sizes.shape  # noqa: E741
        return cls(
            sizes=np.ascontiguousarray(sizes.transpose(1, 0, 2)),
            walk=np.zeros((b, l, l)),
            unseen=np.zeros((f, b, l)),
            rows=np.zeros((b, l, l)),
            unseen_rows=np.zeros((b, l)),
            gram=np.zeros((b, l, l)),
        )

    def add_table(self, table: Float64[np.ndarray, "f b l k"]) -> None:
        total = table.sum(axis=0)
        for fold, own in enumerate(table):
            others = total - own
            seen = others.sum(axis=1)
            learned = _rows_scaled(others, seen).transpose(0, 2, 1)
            unseen = (seen == 0).astype(np.float64)[:, :, None]
            # Q_f is own / n_fc; dividing by n_fc row by row after the product is the same and cheaper.
            self.walk += _divided(own @ learned, self.sizes[fold][:, :, None])
            self.unseen[fold] += (own @ unseen)[:, :, 0]
            shares = _rows_scaled(own, own.sum(axis=1))
            self.rows += shares @ learned
            self.unseen_rows += (shares @ unseen)[:, :, 0]
            self.gram += own @ others.transpose(0, 2, 1)

    def finish(self, prior: Float64[np.ndarray, "b l"]) -> tuple[np.ndarray, np.ndarray]:
        """Walk and rows matrices, averaged over folds (a class over the folds that hold it)."""
        holding = (self.sizes > 0).sum(axis=0)[:, :, None]
        unseen = _divided(self.unseen, self.sizes).sum(axis=0)
        walk = _divided(self.walk + unseen[:, :, None] * prior[:, None, :], holding)
        rows = (self.rows + self.unseen_rows[:, :, None] * prior[:, None, :]) / len(self.sizes)
        return walk, rows


def _rows_scaled(table: Float64[np.ndarray, "b l k"], by: Float64[np.ndarray, "b k"]) -> Float64[np.ndarray, "b l k"]:
    """Each token's counts divided by the token's total; 0 where the total is 0."""
    return np.asarray(table * np.divide(1.0, by, out=np.zeros_like(by), where=by > 0)[:, None, :])


def _divided(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The quotient, and 0 where `by` is 0 (there the value is 0 too)."""
    return np.asarray(np.divide(values, by, out=np.zeros_like(values), where=by > 0))
