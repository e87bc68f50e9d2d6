"""The tokens of each image and how often it has them, kept as the parts of a sparse matrix: making it sorts nothing."""

import numpy as np
import torch
from jaxtyping import Int, Int64
from scipy import sparse

from clustermim.tokenizers.processes import Processes

Piece = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class ImageCounts:
    """Rows of (token, count) pairs, one row for each image (of several classes: each image and class).

    Memory: 8 bytes for each distinct token of each image, 16 for vocabularies above 2^31.
    """

    def __init__(self) -> None:
        # (number of each row, distinct tokens in it, tokens row after row, how often each occurs)
        self._pieces: list[Piece] = []

    def add(
        self,
        rows: Int64[np.ndarray, " m"],
        lengths: Int64[np.ndarray, " m"],
        tokens: Int[np.ndarray, " entries"],
        counts: Int[np.ndarray, " entries"],
    ) -> None:
        """Take in rows that are new.

        Parameters
        ----------
        rows
            Number of each row.
        lengths
            Its distinct tokens.
        tokens, counts
            Row after row: tokens, ascending, and how often each occurs.
        """
        self._pieces.append((rows, lengths, tokens, counts.astype(np.int32)))

    def add_sorted(self, ids: Int[np.ndarray, "m n"], rows: Int64[np.ndarray, " m"]) -> None:
        """Take in images by their ids: sorting inside each image brings equal ones together."""
        # Integers of 32 and 64 bits are sorted by vector instructions.
        ids = np.sort(ids.astype(np.result_type(ids, np.int32), copy=False), axis=1)
        fresh = np.ones(ids.shape, dtype=bool)
        np.not_equal(ids[:, 1:], ids[:, :-1], out=fresh[:, 1:])
        first = np.flatnonzero(fresh)
        self.add(rows, np.count_nonzero(fresh, axis=1), ids.ravel()[first], np.diff(first, append=ids.size))

    def extend(self, other: "ImageCounts") -> None:
        """Take in the rows of another."""
        self._pieces += other._pieces

    def pool(self, processes: Processes) -> None:
        """Put the rows of all processes behind each other, in the order of the processes."""
        parts = (processes.join(torch.from_numpy(part)).numpy() for part in self._joined())
        self._pieces = [tuple(parts)]  # type: ignore[list-item]  # four, as they were

    def matrix(
        self, vocab_size: int
    ) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " used"], sparse.csr_matrix]:
        """The numbers of the rows and the tokens that occur, both ascending, and the counts (rows, used), float64."""
        self._pieces = [self._joined()]
        rows, lengths, tokens, counts = self._pieces[0]
        used, column = compact(tokens, vocab_size)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        found = sparse.csr_matrix((counts.astype(np.float64), column, ends), shape=(len(rows), len(used)))
        if (rows[1:] < rows[:-1]).any():
            order = np.argsort(rows, kind="stable")
            rows, found = rows[order], found[order]
        return rows, used.astype(np.int64), found

    def _joined(self) -> Piece:
        if not self._pieces:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int32)
        joined = [np.concatenate(parts) for parts in zip(*self._pieces, strict=True)]
        return joined[0], joined[1], joined[2], joined[3]


def compact(values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, ascending, and the position of each entry among them; all lie in [0, size)."""
    if size > 4 * len(values) + 1024:
        distinct, position = np.unique(values, return_inverse=True)
        return distinct, position
    present = np.zeros(size, dtype=bool)
    present[values] = True
    distinct = np.flatnonzero(present)
    place = np.empty(size, dtype=np.int32 if size <= 1 << 31 else np.int64)
    place[distinct] = np.arange(len(distinct))
    return distinct, place[values]
