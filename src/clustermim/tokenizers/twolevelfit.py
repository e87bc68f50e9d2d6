"""K-means on two levels, for vocabularies where a step of plain K-means would cost too much.

1. K-means with about √K clusters over all rows: the cells.
2. One more pass takes a seeded random sample; each cell gets its share of the K centroids.
3. K-means inside each cell, on the cell's part of the sample.
4. Lloyd passes over all rows, assigned by multi-probe search: centroids forget the walls between cells.

A cell's share follows from the theory of fine quantisers (Zador, "Asymptotic quantization error of continuous signals",
IEEE Trans. Inf. Theory 1982): if a cell of error e keeps e·k^(−2/d) of it with k centroids, the least total has
k ∝ e^(d/(d+2)). The dimension d that counts is the data's, not the features'; patches behave like some ten.

Sums are whole numbers (each value a multiple of a unit far below float32's own step), so neither the order nor the size
of batches changes them, and memory depends on K and the sample, not on the number of rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from clustermim.data.counted import Stream, uniform
from clustermim.errors import InputError, Stopped
from clustermim.tokenizers.assigning import Assigner
from clustermim.tokenizers.codebook import unit_rows
from clustermim.tokenizers.kmeans import fit_kmeans
from clustermim.tokenizers.nearest import FitMetric
from clustermim.tokenizers.progress import PassProgress
from clustermim.tokenizers.streams import Blocks
from clustermim.tokenizers.twolevel import DEFAULT_PROBES, TwoLevelCodebook
from clustermim.training.launch import StopRequest

TWO_LEVELS_FROM = 8193
"""Vocabulary from which two levels are the default: a patch is then compared with a twentieth of the centroids."""

_SAMPLE_BYTES = 1 << 29
_BLOCK_ROWS, _BLOCK_NUMBERS = 1 << 17, 1 << 23
_DIMENSION = 10.0
_CELL_PASSES = 10  # Lloyd steps inside a cell, at most, after those on its growing samples
_CELL_TOL = 2e-3


@dataclass(frozen=True)
class TwoLevelResult:
    """A codebook on two levels, and how good it is on all rows, searched with its own number of probes.

    Parameters
    ----------
    codebook
        On the device of the rows.
    counts
        (K,) int64: rows assigned to each centroid.
    inertia
        Sum over all rows of the squared distance to the assigned centroid (for ``cosine``: of unit rows).
    num_rows
        Rows in the stream.
    history
        One entry a full pass: ``stage`` (``"full"``), ``rows``, ``inertia`` (mean per row), ``empty``.
    """

    codebook: TwoLevelCodebook
    counts: Tensor
    inertia: float
    num_rows: int
    history: list[dict[str, float | int | str]] = field(default_factory=list)


def fit_two_levels(
    blocks: Blocks,
    k: int,
    *,
    metric: FitMetric = "l2",
    seed: int = 0,
    cells: int | None = None,
    probes: int | None = None,
    refinements: int = 1,
    sample_size: int | None = None,
    progress: bool = False,
    stop: StopRequest | None = None,
) -> TwoLevelResult:
    """Cluster the rows that `blocks()` yields into k groups, in about √k cells.

    Parameters
    ----------
    blocks
        Called once a pass; must yield the same rows in the same order each time, as (n, D) float tensors of any n.
    k
        Number of clusters, at least 4.
    metric
        ``"l2"``, or ``"cosine"`` for spherical K-means.
    seed
        Decides the sample and the starts.
    cells
        C; None takes √k, rounded.
    probes
        Cells searched for a row, here and later; None takes 4, or all if there are fewer.
    refinements
        Lloyd passes over all rows after the cells are filled.
    sample_size
        Rows held in memory to fill the cells; None takes 64 a cluster, at most 512 MB of them.
    progress
        Show a bar on stderr.
    stop
        Looked at between parts of the rows. There are no checkpoints: what was stopped starts again.

    Returns
    -------
    TwoLevelResult
        The same for the same seed, whatever the batches.

    Raises
    ------
    InputError
        k < 4, k larger than the number of distinct rows, rows with NaN or infinity, or no rows at all; `cells` or
        `probes` out of range.
    Stopped, KeyboardInterrupt
        On request.
    """
    wanted = round(math.sqrt(k)) if cells is None else cells
    check_levels("kmeans", k, 2, probes, wanted)
    common: dict[str, Any] = {"metric": metric, "n_init": 1}
    watched = partial(_watched, blocks, stop)
    coarse = fit_kmeans(watched, wanted, seed=seed, max_passes=3, tol=1e-2, progress=progress, **common)
    with PassProgress("patches", show=progress) as bar:
        rows = _Rows(watched, metric, coarse.num_rows, bar)
        sample = _sample(rows, k, seed, sample_size)
        centroids, cell_centroids, offsets = _fill(sample, coarse.centroids, k, seed, bar, common)
        used = min(DEFAULT_PROBES if probes is None else probes, len(cell_centroids))
        codebook = TwoLevelCodebook(centroids, cell_centroids, offsets, metric, used)
        history: list[dict[str, float | int | str]] = []
        for step in range(refinements + 1):
            found = _add_up(rows, codebook, f"K-means on two levels, full pass {step + 1}")
            empty = int((found.counts == 0).sum())
            mean = found.inertia / rows.num_rows
            history.append({"stage": "full", "rows": rows.num_rows, "inertia": mean, "empty": empty})
            if step < refinements:
                codebook = TwoLevelCodebook(_means(codebook, found), cell_centroids, offsets, metric, used)
    return TwoLevelResult(codebook, found.counts, found.inertia, rows.num_rows, history)


def check_levels(kind: str, k: int, levels: int, probes: int | None, cells: int | None = None) -> None:
    """Check, before any work starts, that a vocabulary can have these levels and probes.

    Raises
    ------
    InputError
        Levels other than 1 and 2; two of them for a kind without K-means, for k < 4, or in a fit shared by several
        processes; more cells or probes than there can be; or probes without two levels.
    """
    if levels not in (1, 2):
        raise InputError(f"A codebook has 1 or 2 levels, not {levels}.")
    if levels == 1:
        if probes is not None:
            raise InputError(
                f"--probes {probes} is of use on two levels only; add --levels 2 (the default from k = "
                f"{TWO_LEVELS_FROM} on, for kind kmeans), or leave it out."
            )
        return
    if kind != "kmeans":
        raise InputError(f"Tokenizers of kind {kind!r} have one level; leave --levels out.")
    if k < 4:
        raise InputError(f"K-means on two levels needs k of at least 4, not {k}; use --levels 1.")
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise InputError("K-means on two levels runs in one process; use --devices 1, or --levels 1.")
    cells = round(math.sqrt(k)) if cells is None else cells
    if not 2 <= cells <= k // 2:
        raise InputError(f"A vocabulary of {k} on two levels needs 2 to {k // 2} cells, not {cells}.")
    if probes is not None and not 1 <= probes <= cells:
        raise InputError(f"--probes {probes} is out of range: k = {k} has {cells} cells. Use 1 to {cells}.")


def _watched(blocks: Blocks, stop: StopRequest | None) -> Iterator[Tensor]:
    """The rows of a pass, until a stop is asked for."""
    for block in blocks():
        if stop is not None and stop.reason is not None:
            if stop.interrupted:
                raise KeyboardInterrupt
            raise Stopped(
                f"K-means on two levels was stopped {stop.reason}. It keeps no checkpoints: repeat the command with "
                "--resume to start it again."
            )
        yield block


class _Rows:
    """The rows of each pass, of unit length for cosine, and what the first pass here learnt about them."""

    def __init__(self, blocks: Blocks, metric: FitMetric, num_rows: int, bar: PassProgress) -> None:
        self._blocks, self._unit, self._bar = blocks, metric == "cosine", bar
        self.num_rows = num_rows
        self.largest = 0.0  # absolute value

    def __call__(self, what: str) -> Iterator[Tensor]:
        """One pass, in blocks that are large enough to be sorted into cells."""
        rows = 0
        held: list[Tensor] = []
        for block in self._bar.track(self._blocks(), what, self.num_rows):
            block = block.float()
            rows += len(block)
            held.append(unit_rows(block) if self._unit else block)
            if sum(map(len, held)) >= min(_BLOCK_ROWS, _BLOCK_NUMBERS // block.shape[1]):
                yield torch.cat(held)
                held = []
        if held:
            yield torch.cat(held)
        if rows != self.num_rows:
            raise InputError(f"The patches changed between two passes: {self.num_rows} at first, {rows} now.")


def _sample(rows: _Rows, k: int, seed: int, size: int | None) -> Float[Tensor, "sample d"]:
    """Rows whose hashed positions are small; where too few of them differ, with more that do in front."""
    keep: list[Tensor] = []
    start = 0
    for block in rows("sampling the patches"):
        wanted = size or min(64 * k, _SAMPLE_BYTES // (4 * block.shape[1]))
        place = torch.arange(start, start + len(block), device=block.device)
        keep.append(block[uniform(seed, Stream.SAMPLE, place) < max(wanted, 2 * k) / rows.num_rows])
        rows.largest = max(rows.largest, float(block.abs().max()) if len(block) else 0.0)
        start += len(block)
    sample = torch.cat(keep)
    if len(torch.unique(_keys(sample))) >= k:
        return sample
    seen = torch.empty(0, dtype=torch.float64, device=sample.device)
    fresh: list[Tensor] = []
    for block in rows("looking for more distinct patches"):
        key = _keys(block)
        order = key.argsort(stable=True)
        first = torch.ones(len(key), dtype=torch.bool, device=key.device)
        first[1:] = key[order[1:]] != key[order[:-1]]
        new = order[first][~torch.isin(key[order[first]], seen)].sort().values
        fresh.append(block[new])
        seen = torch.cat([seen, key[new]])
        if len(seen) >= k:
            return torch.cat([*fresh, sample])
    raise InputError(
        f"k = {k} is more than there are distinct patches: {len(seen)} among {rows.num_rows}. "
        f"Choose k of at most {len(seen)}, a larger patch side, or data with more variety."
    )


def _keys(rows: Float[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    """One number a row: the same for equal rows, and for different ones hardly ever."""
    weights = 1.0 + uniform(1, Stream.SAMPLE, torch.arange(rows.shape[1], device=rows.device)).double()
    return torch.cat([(part.double() * weights).sum(1) for part in torch.split(rows + 0.0, 1 << 14)])


def _fill(
    sample: Float[Tensor, "n d"],
    coarse: Float[Tensor, "c d"],
    k: int,
    seed: int,
    bar: PassProgress,
    common: dict[str, Any],
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "c2 d"], Int64[Tensor, " c3"]]:
    """K-means in each cell that holds rows of the sample: centroids, the cells' own, and the cells' bounds."""
    metric = common["metric"]
    cell = Assigner(coarse, metric)(sample)
    order = cell.argsort(stable=True)
    parts = torch.split(sample[order], torch.bincount(cell, minlength=len(coarse)).tolist())
    held = [index for index, part in enumerate(parts) if len(part)]
    error = torch.tensor([float((parts[i] - coarse[i]).double().square().sum()) for i in held], dtype=torch.float64)
    distinct = torch.tensor([len(torch.unique(_keys(parts[i]))) for i in held])
    shares = share_out(k, error.pow(_DIMENSION / (_DIMENSION + 2.0)), distinct).tolist()
    found: list[Tensor] = []
    filled = [parts[index] for index in held]
    for index, (part, share) in enumerate(zip(bar.track(filled, "filling cells", len(sample)), shares, strict=True)):
        if share == 1:
            mean = part.double().mean(0, keepdim=True).float()
            found.append(unit_rows(mean) if metric == "cosine" else mean)
            continue
        fitted = fit_kmeans(
            lambda part=part: iter([part]),  # type: ignore[misc]
            share,
            seed=seed + index,
            max_passes=_CELL_PASSES,
            tol=_CELL_TOL,
            **common,
        )
        found.append(fitted.centroids)
    offsets = torch.tensor([0, *shares]).cumsum(0)
    return torch.cat(found), coarse[held], offsets.to(sample.device)


def share_out(k: int, weights: Float64[Tensor, " c"], most: Int64[Tensor, " c"]) -> Int64[Tensor, " c"]:
    """K things among C takers in proportion to their weights: each at least one, none more than its `most`.

    What rounding leaves goes to the largest remainders; what a full taker cannot take, to the others. `most` must allow
    for k in all.
    """
    shares = torch.ones_like(most)
    while (left := k - int(shares.sum())) > 0:
        open_ = (most > shares).double()
        wish = weights * open_ if float((weights * open_).sum()) > 0.0 else open_
        wish = torch.minimum(wish / wish.sum() * left, (most - shares).double())
        whole = wish.floor().long()
        if int(whole.sum()) == 0:
            order = (wish + open_ * 1e-12).argsort(descending=True, stable=True)[:left]
            whole[order] = (most[order] > shares[order]).long()
        shares += whole
    return shares


@dataclass(frozen=True)
class _Sums:
    sums: Tensor  # (K, D) float64
    counts: Tensor  # (K,) int64
    inertia: float


def _add_up(rows: _Rows, codebook: TwoLevelCodebook, what: str) -> _Sums:
    """Assign every row once and add up the clusters."""
    where = torch.device("cpu") if codebook.centroids.device.type == "mps" else codebook.centroids.device
    scale = 2.0 ** min(62 - math.ceil(math.log2(max(rows.largest * rows.num_rows, 1e-30))), 100)
    sums = torch.zeros(codebook.size, codebook.dim, dtype=torch.int64, device=where)
    counts = torch.zeros(codebook.size, dtype=torch.int64, device=where)
    inertia = 0.0
    for block in rows(what):
        ids = codebook.assign(block)
        exact = block.to(where).double()
        inertia += float((exact - codebook.centroids[ids].to(where).double()).square().sum())
        ids = ids.to(where)
        sums.index_add_(0, ids, exact.mul_(scale).round_().long())
        counts += torch.bincount(ids, minlength=codebook.size)
    return _Sums(sums.double() / scale, counts, inertia)


def _means(codebook: TwoLevelCodebook, found: _Sums) -> Float[Tensor, "k d"]:
    """The means of the clusters, of unit length for cosine; a cluster without rows stays where it is."""
    used = found.counts > 0
    length = found.counts.double()[:, None]
    if codebook.metric == "cosine":
        length = found.sums.norm(dim=1, keepdim=True)
        used &= length[:, 0] > 0  # rows that cancel out have no direction
    means = (found.sums / length.clamp_min(1e-300)).float().to(codebook.centroids.device)
    return torch.where(used[:, None].to(means.device), means, codebook.centroids)
