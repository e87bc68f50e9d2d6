"""Rows of features on their way into K-means: in blocks that are fixed by position, and counted where they repeat."""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clustermim.data.counted import Stream, counter_hash
from clustermim.errors import InputError
from clustermim.tokenizers.codebook import unit_rows
from clustermim.tokenizers.processes import Processes
from clustermim.tokenizers.progress import PassProgress

Blocks = Callable[[], Iterable[Tensor]]
"""Called once a pass; yields the same (n, D) rows in the same order each time, cut anyhow."""

BLOCK = 8192
"""Rows of a block; fixed, because it decides how sums are rounded."""


class RowStream:
    """The rows of this process in blocks that end at multiples of `BLOCK` in the whole data.

    Parameters
    ----------
    blocks
        This process's rows. float64 stays float64, all else becomes float32.
    unit
        Scale the rows to unit length.
    bar
        Told of every part.
    processes
        Who else has rows.
    first_row
        Position of this process's first row in the whole data.
    look
        Called with every part; may raise to end the pass.

    Attributes
    ----------
    local_rows
        Rows of this process; set by the pass that samples.
    num_rows, largest, square_sum
        Over all processes: rows, the largest absolute value, the sum of all squares. Set by the pass that samples.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        unit: bool,
        bar: PassProgress,
        processes: Processes | None = None,
        first_row: int = 0,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self.processes = Processes() if processes is None else processes
        self._blocks, self._unit, self._bar, self._look = blocks, unit, bar, look
        self.first_row = first_row
        self.num_rows: int | None = None
        self.local_rows: int | None = None
        self.largest = 0.0
        self.square_sum = 0.0
        self._pass = 0

    def __call__(self) -> Iterator[Tensor]:
        """One pass."""
        what = "looking at the patches" if self.num_rows is None else f"K-means, full pass {self._pass}"
        self._pass += 1
        held: list[Tensor] = []
        rows, wanted = 0, BLOCK - self.first_row % BLOCK
        for part in self._bar.track(self._blocks(), what, self.local_rows):
            self._look()
            held.append(part)
            rows += len(part)
            if rows < wanted:
                continue
            joined = torch.cat(held) if len(held) > 1 else part
            start = 0
            while start + wanted <= rows:
                yield self._ready(joined[start : start + wanted])
                start, wanted = start + wanted, BLOCK
            held = [joined[start:]] if start < rows else []
            rows -= start
        if rows:
            yield self._ready(torch.cat(held))

    def _ready(self, block: Tensor) -> Tensor:
        block = block if block.dtype == torch.float64 else block.float()
        return unit_rows(block).to(block.dtype) if self._unit else block


class RowsInMemory:
    """Rows that are held anyway, with the interface of a stream; each process holds its own."""

    def __init__(self, rows: Tensor, processes: Processes | None = None) -> None:
        self.processes = Processes() if processes is None else processes
        self.rows = rows
        self.local_rows: int | None = len(rows)
        self.num_rows: int | None = sum(self.processes.sizes(len(rows)))
        self.largest = self.processes.largest(float(rows.abs().max()) if len(rows) else 0.0)
        squares = torch.tensor([sum(square_sum(block) for block in self())], dtype=torch.float64)
        self.square_sum = float(self.processes.add(squares))

    def __call__(self) -> Iterator[Tensor]:
        """One pass."""
        if len(self.rows):
            yield from torch.split(self.rows, BLOCK)


def square_sum(block: Tensor) -> float:
    """The sum of all squares, in float64."""
    block = block.cpu() if block.device.type == "mps" else block  # which has no float64
    return float(block.double().square().sum())


def row_hash(rows: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
    """64 bits of each row; equal rows agree, and two different ones agree once in 2^64."""
    bits = (rows.float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0 makes −0 and 0 one number
    weights = counter_hash(0, Stream.SAMPLE, torch.arange(rows.shape[1], device=rows.device)) | 1
    return (bits * weights).sum(1)


def distinct_rows(rows: Float[Tensor, "n d"], enough: int, processes: Processes) -> int:
    """How many different rows the processes hold; each counts on until it has found `enough`."""
    seen = torch.empty(0, dtype=torch.int64, device=rows.device)
    for block in torch.split(rows, BLOCK):
        seen = torch.unique(torch.cat([seen, row_hash(block)]))
        if len(seen) >= enough:
            break
    return len(torch.unique(processes.join(seen)))


def find_distinct(stream: RowStream, k: int) -> Float[Tensor, "k d"]:
    """One row of each kind, until k kinds are found.

    Raises
    ------
    InputError
        There are fewer than k kinds of rows.
    """
    seen: Tensor | None = None
    found: list[Tensor] = []
    for block in stream():
        key = row_hash(block)
        seen = key[:0] if seen is None else seen
        fresh = ~torch.isin(key, seen)
        if not bool(fresh.any()) or len(seen) >= k:
            continue
        block, key = block[fresh], key[fresh]
        first = _first_of_each(key)
        found.append(block[first])
        seen = torch.cat([seen, key[first]])
    assert seen is not None
    rows, keys = stream.processes.join(torch.cat(found)), stream.processes.join(seen)
    rows = rows[_first_of_each(keys)]
    if len(rows) >= k:
        return rows[:k]
    if len(rows) == 1:
        raise InputError(
            f"k = {k} is more than there are distinct patches: the features of all {stream.num_rows} are the same, and "
            "features of no variance cannot be clustered. "
            "Look at the images (are they blank?), or choose other features."
        )
    raise InputError(
        f"k = {k} is more than there are distinct patches: {len(rows)} among {stream.num_rows}. "
        f"Choose k of at most {len(rows)}, a larger patch side, or data with more variety."
    )


def _first_of_each(key: Int64[Tensor, " n"]) -> Int64[Tensor, " m"]:
    """Where each different key stands for the first time, in order."""
    values, inverse = torch.unique(key, return_inverse=True)
    place = torch.arange(len(key), device=key.device)
    first = torch.full_like(values, len(key)).scatter_reduce_(0, inverse, place, "amin")
    return first.sort().values
