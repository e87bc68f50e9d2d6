"""A random sample of a stream whose length nobody knows, in memory that is fixed beforehand.

The sample is the rows with the smallest hashes of their positions in the whole data (reservoir sampling by random keys;
Vitter, "Random sampling with a reservoir", 1985), so it does not depend on how rows are cut or who reads them.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clustermim.data.counted import Stream, counter_hash
from clustermim.errors import InputError
from clustermim.tokenizers.processes import Processes
from clustermim.tokenizers.streams import BLOCK, RowsInMemory, RowStream, distinct_rows, find_distinct, square_sum

SAMPLE_BYTES = 1 << 29
"""At most so much of a sample is held, over all processes together."""

_LEAST = 1 << 17
_A_CLUSTER = 512


class Sample:
    """Sampled rows in the order of their keys; each process holds those of its own rows.

    Each prefix is itself a random sample.
    """

    def __init__(self, rows: Float[Tensor, "n d"], keys: Int64[Tensor, " n"], processes: Processes) -> None:
        self.rows, self.keys, self.processes = rows, keys, processes
        self._ladder = processes.join(keys).sort().values

    def __len__(self) -> int:
        """Rows over all processes."""
        return len(self._ladder)

    def prefix(self, count: int) -> RowsInMemory:
        """The first rows, each process holding its own of them."""
        return RowsInMemory(self._mine(count), self.processes)

    def gathered(self, count: int) -> Float[Tensor, "count d"]:
        """The first rows, all of them in every process."""
        mine = self._mine(count)
        rows, keys = self.processes.join(mine), self.processes.join(self.keys[: len(mine)])
        return rows if self.processes.size == 1 else rows[keys.argsort()]

    def _mine(self, count: int) -> Tensor:
        last = self._ladder[min(count, len(self)) - 1 :][:1]
        return self.rows[: int(torch.searchsorted(self.keys, last, right=True))]


class _Reservoir:
    """The rows with the smallest keys so far; room for some more than wanted, so that making room is rare."""

    def __init__(self, limit: int, like: Tensor) -> None:
        self.limit, self.filled = limit, 0
        self.bound: int | None = None
        room = limit + max(limit // 8, BLOCK)
        self.rows = torch.empty(room, like.shape[1], dtype=like.dtype, device=like.device)
        self.keys = torch.empty(room, dtype=torch.int64, device=like.device)

    def add(self, rows: Tensor, keys: Tensor) -> None:
        if self.bound is not None:
            chosen = (keys <= self.bound).nonzero()[:, 0]
            rows, keys = rows[chosen], keys[chosen]
        if self.filled + len(rows) > len(self.rows):
            self._make_room()
        end = self.filled + len(rows)
        self.rows[self.filled : end], self.keys[self.filled : end] = rows, keys
        self.filled = end

    def _make_room(self) -> None:
        """Move what is kept to the front, into the places of what is not: nothing is copied as a whole."""
        keys = self.keys[: self.filled]
        self.bound = int(keys.sort().values[self.limit - 1])
        keep = keys <= self.bound  # keys never tie, so just `limit` of them
        holes = (~keep[: self.limit]).nonzero()[:, 0]
        movers = keep[self.limit :].nonzero()[:, 0] + self.limit
        self.rows[holes], self.keys[holes] = self.rows[movers], self.keys[movers]
        self.filled = self.limit

    def sorted(self) -> tuple[Tensor, Tensor]:
        order = self.keys[: self.filled].argsort()[: self.limit]
        return self.rows[order], self.keys[order]


def draw_sample(stream: RowStream, k: int, seed: int, size: int | None, a_cluster: int | None = None) -> Sample:
    """Pass over all rows once: draw the sample, count, measure, and look for bad values.

    Where `size` is None the sample has `a_cluster` rows a cluster (None: 512), at least 131,072 in all, at most
    `SAMPLE_BYTES` of them.

    Raises
    ------
    InputError
        Bad values, no rows, or fewer than k distinct ones.
    """
    processes = stream.processes
    held: _Reservoir | None = None
    total = 0
    largest = squares = 0.0
    problem: InputError | None = None
    for block in stream():
        first = stream.first_row + total
        if held is None:
            row_bytes = max(block.shape[1], 1) * block.element_size()
            wanted = size or min(max(_LEAST, (a_cluster or _A_CLUSTER) * k), SAMPLE_BYTES // row_bytes)
            held = _Reservoir(max(wanted, 2 * k), block)
        low, high = torch.aminmax(block)
        most = max(-float(low), float(high))
        if not most < float("inf"):  # NaN fails the comparison too
            problem = InputError(
                f"The features of the patches {first} to {first + len(block) - 1} hold NaN or infinity. "
                "Look at the images they come from, or at the weights of the feature network."
            )
            break
        largest, squares = max(largest, most), squares + square_sum(block)
        places = torch.arange(first, first + len(block), device=block.device)
        held.add(block, counter_hash(seed, Stream.SAMPLE, places))
        total += len(block)
    if processes.any(problem is not None):  # asked by all, so that none waits for one that has ended
        raise problem or InputError("Another process found NaN or infinity in the features; its message says where.")
    stream.local_rows, stream.num_rows = total, sum(processes.sizes(total))
    if not stream.num_rows:
        raise InputError("There are no patches to cluster: the data is empty.")
    if processes.any(held is None) or held is None:
        raise InputError(f"{processes.size} processes are more than there are images to share; use fewer --devices.")
    stream.largest = processes.largest(largest)
    stream.square_sum = float(processes.add(torch.tensor([squares], dtype=torch.float64)))
    rows, keys = held.sorted()
    limit = held.limit
    del held
    if processes.size > 1:
        last = processes.join(keys).sort().values[:limit][-1]
        rows, keys = rows[keys <= last], keys[keys <= last]
    if distinct_rows(rows, k, processes) < k:
        extra = find_distinct(stream, k)
        if processes.rank == 0:  # in front of all others
            before = torch.arange(len(extra), device=keys.device) + torch.iinfo(torch.int64).min
            rows, keys = torch.cat([extra, rows]), torch.cat([before, keys])
    return Sample(rows, keys, processes)
