"""K-means on two levels, for vocabularies where a step of plain K-means would cost too much.

1. One pass takes a seeded random sample, counts the rows and looks for bad values (`sampling.py`).
2. K-means of the sample with about √K clusters: the cells. Each cell gets its share of the K centroids.
3. K-means inside each cell, on the cell's part of the sample.
4. Lloyd passes over all rows, assigned by multi-probe search: centroids forget the walls between cells.

A cell's share follows from the theory of fine quantisers (Zador, "Asymptotic quantization error of continuous signals",
IEEE Trans. Inf. Theory 1982): if a cell of error e keeps e·k^(−2/d) of it with k centroids, the least total has
k ∝ e^(d/(d+2)). The dimension d that counts is the data's, not the features'; patches behave like some ten.

Sums are whole numbers (each value a multiple of a unit far below float32's own step), so neither the order nor the size
of batches changes them, and memory depends on K and the sample, not on the number of rows. Several processes share out
the rows in the passes and the cells in between.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from clustermim.errors import InputError
from clustermim.tokenizers.assigning import Assigner
from clustermim.tokenizers.codebook import unit_rows
from clustermim.tokenizers.kmeans import fit_kmeans
from clustermim.tokenizers.lloyd import Progress, Step, Sums, check_count, inertia_of, moved, whole_units
from clustermim.tokenizers.nearest import FitMetric
from clustermim.tokenizers.processes import Processes
from clustermim.tokenizers.progress import PassProgress
from clustermim.tokenizers.sampling import draw_sample
from clustermim.tokenizers.state import FitState
from clustermim.tokenizers.streams import Blocks, RowStream, row_hash
from clustermim.tokenizers.twolevel import DEFAULT_PROBES, TwoLevelCodebook
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import StopRequest

TWO_LEVELS_FROM = 8193
"""Vocabulary from which two levels are the default: a patch is then compared with a twentieth of the centroids."""

_A_CLUSTER = 64  # rows of the sample
_BLOCK_ROWS, _BLOCK_NUMBERS = 1 << 17, 1 << 23
_CELLS_TOL, _CELLS_PASSES = 1e-2, 3  # where cells begin and end matters little
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
    history: list[Step] = field(default_factory=list)


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
    first_row: int = 0,
    device: str | torch.device = "cpu",
    checkpoints: Checkpoints | None = None,
    stop: StopRequest | None = None,
) -> TwoLevelResult:
    """Cluster the rows that `blocks()` yields into k groups, in about √k cells.

    Where a process group of `torch.distributed` exists, all its processes call this together, each with its own part of
    the rows, and all get the same result.

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
    first_row, device, checkpoints, stop
        As for `fit_kmeans`; a checkpoint is written when the cells are filled, and after each pass that follows.

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
    processes = Processes()
    state = FitState(checkpoints, stop, processes, device)
    with PassProgress("patches", show=progress and processes.rank == 0) as bar:
        unit = metric == "cosine"
        stream = RowStream(blocks, unit=unit, bar=bar, processes=processes, first_row=first_row, look=state.look)
        if state.stage == "sample":
            sample = draw_sample(stream, k, seed, sample_size, _A_CLUSTER)
            state.measured(stream, in_memory=False)
            rows = sample.gathered(len(sample)).float()
            del sample
            coarse = _find_cells(rows, wanted, metric, seed, processes)
            centroids, coarse, offsets = _fill(rows, coarse, k, metric, seed, bar, processes)
            del rows
            state.facts |= {"coarse": coarse.cpu(), "offsets": offsets.cpu()}
            state.keep("full", centroids)
        else:
            state.tell(stream)
        parts = state.facts["coarse"].to(state.centroids.device), state.facts["offsets"].to(state.centroids.device)
        used = min(DEFAULT_PROBES if probes is None else probes, len(parts[0]))
        assert stream.num_rows is not None
        while True:
            step = state.progress.steps
            codebook = TwoLevelCodebook(state.centroids, *parts, metric, used)
            found = _add_up(stream, codebook)
            empty, mean = len(found.empty), found.inertia / stream.num_rows
            state.history.append({"stage": "full", "rows": stream.num_rows, "inertia": mean, "empty": empty})
            if step == refinements:
                return TwoLevelResult(codebook, found.counts, found.inertia, stream.num_rows, state.history)
            state.keep("full", moved(codebook.centroids, found, metric), progress=Progress(steps=step + 1))


def check_levels(kind: str, k: int, levels: int, probes: int | None, cells: int | None = None) -> None:
    """Check, before any work starts, that a vocabulary can have these levels and probes.

    Raises
    ------
    InputError
        Levels other than 1 and 2; two of them for a kind without K-means, or for k < 4; more cells or probes than there
        can be; or probes without two levels.
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
    cells = round(math.sqrt(k)) if cells is None else cells
    if not 2 <= cells <= k // 2:
        raise InputError(f"A vocabulary of {k} on two levels needs 2 to {k // 2} cells, not {cells}.")
    if probes is not None and not 1 <= probes <= cells:
        raise InputError(f"--probes {probes} is out of range: k = {k} has {cells} cells. Use 1 to {cells}.")


def _find_cells(
    rows: Float[Tensor, "n d"], cells: int, metric: FitMetric, seed: int, processes: Processes
) -> Float[Tensor, "c d"]:
    """K-means of the sample, a part of which each process takes."""
    first, last = (len(rows) * rank // processes.size for rank in (processes.rank, processes.rank + 1))
    return fit_kmeans(
        lambda: iter([rows[first:last]]),
        cells,
        metric=metric,
        seed=seed,
        n_init=1,
        max_passes=_CELLS_PASSES,
        tol=_CELLS_TOL,
        first_row=first,
        processes=processes,
    ).centroids


def _fill(
    sample: Float[Tensor, "n d"],
    coarse: Float[Tensor, "c d"],
    k: int,
    metric: FitMetric,
    seed: int,
    bar: PassProgress,
    processes: Processes,
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "c2 d"], Int64[Tensor, " c3"]]:
    """K-means in each cell that holds rows of the sample: centroids, the cells' own, and the cells' bounds.

    Processes take cells in turn.
    """
    cell = Assigner(coarse, metric)(sample)
    order = cell.argsort(stable=True)
    parts = torch.split(order, torch.bincount(cell, minlength=len(coarse)).tolist())
    held = [index for index, part in enumerate(parts) if len(part)]
    error = torch.tensor([float((sample[parts[i]] - coarse[i]).double().square().sum()) for i in held]).double()
    distinct = torch.tensor([len(torch.unique(row_hash(sample[parts[i]]))) for i in held])
    shares = share_out(k, error.pow(_DIMENSION / (_DIMENSION + 2.0)), distinct).tolist()
    offsets = torch.tensor([0, *shares]).cumsum(0)
    centroids = torch.zeros(k, sample.shape[1], device=sample.device)
    turn = list(range(processes.rank, len(held), processes.size))
    mine = (sample[parts[held[index]]] for index in turn)
    for index, rows in zip(turn, bar.track(mine, "filling cells", len(sample) // processes.size), strict=True):
        here = centroids[offsets[index] : offsets[index + 1]]
        if shares[index] == 1:
            mean = rows.double().mean(0, keepdim=True).float()
            here.copy_(unit_rows(mean) if metric == "cosine" else mean)
            continue
        found = fit_kmeans(
            lambda rows=rows: iter([rows]),  # type: ignore[misc]
            shares[index],
            metric=metric,
            seed=seed + index,
            n_init=1,
            max_passes=_CELL_PASSES,
            tol=_CELL_TOL,
            processes=Processes(alone=True),
        )
        here.copy_(found.centroids)
    return processes.add(centroids), coarse[held], offsets.to(sample.device)


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


def _add_up(stream: RowStream, codebook: TwoLevelCodebook) -> Sums:
    """Assign every row once and add up the clusters."""
    where = torch.device("cpu") if codebook.centroids.device.type == "mps" else codebook.centroids.device
    scale, rows = whole_units(stream), 0
    sums = torch.zeros(codebook.size, codebook.dim, dtype=torch.int64, device=where)
    counts = torch.zeros(codebook.size, dtype=torch.int64)
    for block in _large(stream):
        ids = codebook.assign(block)
        sums.index_add_(0, ids.to(where), block.to(where).double().mul_(scale).round_().long())
        counts += torch.bincount(ids, minlength=codebook.size).cpu()
        rows += len(block)
    check_count(stream, rows)
    counts, exact = stream.processes.add(counts), stream.processes.add(sums).cpu().double() / scale
    inertia = inertia_of(stream, codebook.centroids, exact, counts)
    return Sums(exact, counts, inertia, codebook.centroids.new_empty(0, codebook.dim))


def _large(stream: RowStream) -> Iterator[Float[Tensor, "n d"]]:
    """One pass, in blocks that are large enough to be sorted into cells."""
    held: list[Tensor] = []
    for block in stream():
        held.append(block.float())
        if sum(map(len, held)) >= min(_BLOCK_ROWS, _BLOCK_NUMBERS // block.shape[1]):
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)
