"""Rows of features on their way into K-means: in fixed blocks, as a seeded sample, and counted where they repeat."""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clustermim.data.counted import Stream, counter_hash
from clustermim.errors import InputError
from clustermim.tokenizers.codebook import unit_rows
from clustermim.tokenizers.progress import PassProgress

Blocks = Callable[[], Iterable[Tensor]]
"""Called once a pass; yields the same (n, D) rows in the same order each time, cut anyhow."""

BLOCK = 8192
"""Rows of a block; fixed, because it decides how sums are rounded."""

_SAMPLE_BYTES = 1 << 29


class RowStream:
    """The rows in blocks of a fixed size, however the caller cut them, with what one pass over them taught."""

    def __init__(self, blocks: Blocks, *, unit: bool, bar: PassProgress) -> None:
        self._blocks, self._unit, self._bar = blocks, unit, bar
        self.num_rows: int | None = None
        self.largest = 0.0  # absolute value
        self.square_sum = 0.0
        self._pass = 0

    def __call__(self) -> Iterator[Tensor]:
        """One pass."""
        what = "looking at the patches" if self.num_rows is None else f"K-means, full pass {self._pass}"
        self._pass += 1
        held: list[Tensor] = []
        rows = 0
        for part in self._bar.track(self._blocks(), what, self.num_rows):
            held.append(part)
            rows += len(part)
            if rows < BLOCK:
                continue
            joined = torch.cat(held) if len(held) > 1 else part
            whole = rows - rows % BLOCK
            for start in range(0, whole, BLOCK):
                yield self._ready(joined[start : start + BLOCK])
            held, rows = [joined[whole:]], rows - whole
        if rows:
            yield self._ready(torch.cat(held))

    def _ready(self, block: Tensor) -> Tensor:
        block = block.float()
        return unit_rows(block) if self._unit else block


class RowsInMemory:
    """Rows that are held anyway, with the interface of a stream."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self.num_rows: int | None = len(rows)
        self.largest = float(rows.abs().max())
        self.square_sum = sum(_square_sum(block) for block in self())

    def __call__(self) -> Iterator[Tensor]:
        """One pass."""
        yield from torch.split(self._rows, BLOCK)


def _square_sum(block: Tensor) -> float:
    block = block.cpu() if block.device.type == "mps" else block  # which has no float64
    return float(block.double().square().sum())


def draw_sample(stream: RowStream, k: int, seed: int, size: int | None) -> Float[Tensor, "sample d"]:
    """The rows with the smallest hashes of their positions, in the order of the hash.

    So each prefix is itself a random sample, and where fewer than k of the rows differ, that is found here.
    """
    keep: list[Tensor] = []
    keys: list[Tensor] = []
    bound: int | None = None
    limit = held = total = 0
    finite = True
    for block in stream():
        if not limit:
            wanted = size or min(max(1 << 17, 256 * k), _SAMPLE_BYTES // (4 * max(block.shape[1], 1)))
            limit = max(wanted, 2 * k)
        largest = float(block.abs().max())
        finite = finite and largest < float("inf")  # NaN fails the comparison too
        if not finite:
            raise InputError(
                f"The features of the patches {total} to {total + len(block) - 1} hold NaN or infinity. "
                "Look at the images they come from, or at the weights of the feature network."
            )
        stream.largest = max(stream.largest, largest)
        stream.square_sum += _square_sum(block)
        key = counter_hash(seed, Stream.SAMPLE, torch.arange(total, total + len(block), device=block.device))
        total += len(block)
        if bound is not None:
            chosen = (key < bound).nonzero()[:, 0]
            key, block = key[chosen], block[chosen]
        keep.append(block.clone())  # a view would keep the whole batch alive
        keys.append(key)
        held += len(key)
        if held >= 2 * limit:
            keep, keys = _smallest(keep, keys, limit)
            bound, held = int(keys[0][-1]), limit
    if not total:
        raise InputError("There are no patches to cluster: the data is empty.")
    stream.num_rows = total
    keep, keys = _smallest(keep, keys, limit)
    sample = keep[0]
    if distinct_rows(sample, k) < k:
        sample = _with_all_distinct(stream, sample, k)
    return sample


def _smallest(rows: list[Tensor], keys: list[Tensor], limit: int) -> tuple[list[Tensor], list[Tensor]]:
    key = torch.cat(keys)
    order = key.argsort(stable=True)[:limit]
    return [torch.cat(rows)[order]], [key[order]]


def _row_hash(rows: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
    """64 bits of each row; equal rows agree, and two different ones agree once in 2^64."""
    bits = (rows.float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0 makes −0 and 0 one number
    weights = counter_hash(0, Stream.SAMPLE, torch.arange(rows.shape[1], device=rows.device)) | 1
    return (bits * weights).sum(1)


def distinct_rows(rows: Float[Tensor, "n d"], enough: int | None = None) -> int:
    """How many different rows there are; counting may end once `enough` are found."""
    seen = torch.empty(0, dtype=torch.int64, device=rows.device)
    for block in torch.split(rows, BLOCK):
        seen = torch.unique(torch.cat([seen, _row_hash(block)]))
        if enough is not None and len(seen) >= enough:
            break
    return len(seen)


def _with_all_distinct(stream: RowStream, sample: Tensor, k: int) -> Tensor:
    """The sample has fewer than k different rows: look through all rows for more, and put them in front."""
    seen = torch.empty(0, dtype=torch.int64, device=sample.device)
    found: list[Tensor] = []
    for block in stream():
        key = _row_hash(block)
        fresh = ~torch.isin(key, seen)
        if not bool(fresh.any()):
            continue
        block, key = block[fresh], key[fresh]
        values, inverse = torch.unique(key, return_inverse=True)
        first = torch.full_like(values, len(key)).scatter_reduce_(
            0, inverse, torch.arange(len(key), device=key.device), "amin"
        )
        found.append(block[first.sort().values])
        seen = torch.cat([seen, values])
        if len(seen) >= k:
            return torch.cat([*found, sample])
    raise InputError(
        f"k = {k} is more than there are distinct patches: {len(seen)} among {stream.num_rows}. "
        f"Choose k of at most {len(seen)}, a larger patch side, or data with more variety."
    )
