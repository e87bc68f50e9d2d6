"""K-means over a stream of patch features, in memory that does not grow with their number.

The way (Lloyd 1982; Arthur and Vassilvitskii, "k-means++", SODA 2007, with the greedy choice among several draws):

1. One pass takes a seeded random sample, counts the rows and looks for bad values (`sampling.py`).
2. k-means++ (`seeding.py`) and a few Lloyd steps on a small part of the sample, from several starts; the best goes on.
3. Lloyd steps (`lloyd.py`) on parts of the sample that grow fourfold: most of the way is made where a step is cheap,
   the cheaper as rows are compared with the centroids around them only (`neighbourhoods.py`).
4. Full passes over all rows, with exact sums, until the inertia hardly falls.

Rows are cut into blocks by their position in the whole data and sums are kept in float64 (or in wide fixed point where
atomic adds would lose the order), so the same seed gives the same centroids whatever the batch size. Several processes
with a part of the rows each add up their sums (`processes.py`) and so find the same centroids as one, to rounding.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clustermim.errors import InputError
from clustermim.tokenizers.lloyd import Step, lloyd_steps
from clustermim.tokenizers.nearest import FitMetric
from clustermim.tokenizers.neighbourhoods import Neighbourhoods
from clustermim.tokenizers.processes import Processes
from clustermim.tokenizers.progress import PassProgress
from clustermim.tokenizers.sampling import Sample, draw_sample
from clustermim.tokenizers.seeding import plus_plus
from clustermim.tokenizers.state import FitState
from clustermim.tokenizers.streams import Blocks, RowsInMemory, RowStream
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import StopRequest

MAX_PASSES = 20
"""Full passes at most, unless told otherwise."""
TOL = 5e-3
"""Share of the inertia; a full pass that lowers it by less is the last, unless told otherwise."""

_START_ROWS = 1 << 14  # at least, to compare starts on
_LEVEL_STEPS = 60  # at most, on each part of the sample
_FULL_TOL = 1e-4  # where all rows are in memory
_LEVEL_TOL = 3e-4
_LEVEL_NOISE = 0.3


@dataclass(frozen=True)
class KMeansResult:
    """Centroids, and how good they are on all rows.

    Parameters
    ----------
    centroids
        (K, D) float32; float64 if the rows were.
    counts
        (K,) int64: rows nearest to each centroid.
    inertia
        Sum over all rows of the squared distance to the nearest centroid (for ``cosine``: of unit rows to unit
        centroids, that is 2 − 2·cosine), exact for these centroids.
    num_rows
        Rows in the stream.
    history
        One entry a Lloyd step: ``stage`` (``"start"``, ``"sample"`` or ``"full"``), ``rows``, ``inertia`` (mean per
        row), ``empty`` (clusters without rows).
    starts
        Mean inertia per row of each start, on the rows on which starts are compared: their spread says how much the
        result owes to luck.
    """

    centroids: Tensor
    counts: Tensor
    inertia: float
    num_rows: int
    history: list[Step] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)


def fit_kmeans(
    blocks: Blocks,
    k: int,
    *,
    metric: FitMetric = "l2",
    seed: int = 0,
    n_init: int | None = None,
    max_passes: int = MAX_PASSES,
    tol: float = TOL,
    sample_size: int | None = None,
    progress: bool = False,
    first_row: int = 0,
    device: str | torch.device = "cpu",
    checkpoints: Checkpoints | None = None,
    stop: StopRequest | None = None,
    processes: Processes | None = None,
) -> KMeansResult:
    """Cluster the rows that `blocks()` yields into k groups.

    Where a process group of `torch.distributed` exists, all its processes call this together, each with its own part of
    the rows, and all get the same result.

    Parameters
    ----------
    blocks
        Called once a pass; must yield the same rows in the same order each time, as (n, D) float tensors of any n.
        Rows of float64 are clustered in float64, all others in float32.
    k
        Number of clusters, at least 2.
    metric
        ``"l2"``, or ``"cosine"`` for spherical K-means: rows and centroids are scaled to unit length.
    seed
        Decides the sample and the starts.
    n_init
        Starts compared on a small sample; None takes 4 up to k = 256 and 1 above, where starts differ little.
    max_passes
        At most so many passes over all rows (the pass that samples them not counted).
    tol
        Stop when a full pass lowers the inertia by less than this share (1e-4 at most where all rows fit the sample).
    sample_size
        Rows held in memory; None takes 512 a cluster, at least 131,072, at most 512 MB of them.
    progress
        Show a bar on stderr.
    first_row
        Position of this process's first row in the data of all processes, which stand behind each other.
    device
        Where the rows are; of use only to go on from a checkpoint.
    checkpoints
        Where to keep the state after each stage and full pass, and to go on from it if there is one: the centroids are
        then bit for bit those of a fit that was never broken off. The first process writes and reads them.
    stop
        Looked at between parts of the rows.
    processes
        Who has parts of the rows; None: the process group, where there is one.

    Returns
    -------
    KMeansResult
        On the device of the rows.

    Raises
    ------
    InputError
        k < 2, k larger than the number of distinct rows, rows that are all the same, rows with NaN or infinity, no rows
        at all, or rows that changed since the checkpoint.
    Stopped, KeyboardInterrupt
        On request.
    """
    if k < 2:
        raise InputError(f"K-means with k = {k} tells no patches apart; choose k of at least 2.")
    if metric not in ("l2", "cosine"):
        raise InputError(f"K-means cannot be fitted with metric {metric!r}; choose l2 or cosine.")
    processes = processes or Processes()
    state = FitState(checkpoints, stop, processes, device)
    with PassProgress("patches", show=progress and processes.rank == 0) as bar:
        unit, look = metric == "cosine", state.look
        stream = RowStream(blocks, unit=unit, bar=bar, processes=processes, first_row=first_row, look=look)
        data: RowStream | RowsInMemory = stream
        if state.needs_sample:
            sample = draw_sample(stream, k, seed, sample_size)
            whole = len(sample) == stream.num_rows
            state.measured(stream, in_memory=whole)
            if state.stage == "sample":
                _fit_sample(sample, k, metric, seed, n_init or (4 if k <= 256 else 1), state)
            if whole:  # steps are cheap, and nothing need be made again
                data, tol = sample.prefix(len(sample)), min(tol, _FULL_TOL)
            del sample
        else:
            state.tell(stream)
        found, centroids = lloyd_steps(
            data,
            state.centroids,
            metric,
            max(max_passes, 1),
            tol,
            state.history,
            "full",
            progress=state.progress,
            after=lambda moved, now: state.keep("full", moved, progress=now),
        )
    # The most frequent token first: legible pictures, and no trace of the start.
    order = found.counts.argsort(descending=True, stable=True)
    return KMeansResult(
        centroids[order.to(centroids.device)],
        found.counts[order],
        found.inertia,
        data.num_rows or 0,
        state.history,
        state.starts,
    )


def _fit_sample(sample: Sample, k: int, metric: FitMetric, seed: int, n_init: int, state: FitState) -> None:
    """k-means++ starts on a prefix of the sample, then Lloyd steps on prefixes that grow fourfold."""
    rows = min(len(sample), max(32 * k, _START_ROWS))
    if not state.rows:
        part, drawn = sample.prefix(rows), sample.gathered(min(rows, max(16 * k, 1 << 12)))
        best: tuple[float, Tensor] | None = None
        for start in range(n_init):
            seeds = sample.processes.from_first(plus_plus(drawn, k, seed, start))
            found, centroids = lloyd_steps(
                part, seeds, metric, _LEVEL_STEPS, _level_tol(k, rows), state.history, "start"
            )
            state.starts.append(found.inertia / rows)
            if best is None or found.inertia < best[0]:
                best = found.inertia, centroids
        assert best is not None
        state.keep("sample", best[1], rows=rows)
    while state.rows < len(sample):
        rows = min(4 * state.rows, len(sample))
        part, tol = sample.prefix(rows), _level_tol(k, rows)
        near = Neighbourhoods(part.rows) if Neighbourhoods.pay(part, k) else None
        _, centroids = lloyd_steps(part, state.centroids, metric, _LEVEL_STEPS, tol, state.history, "sample", near=near)
        state.keep("sample", centroids, rows=rows)
    state.keep("full", state.centroids)


def _level_tol(k: int, rows: int) -> float:
    """Where to leave a part of the sample: the fewer rows, the less of what a step gains holds for others.

    A mean of m rows is off by 1/m of their variance, so gains far below that are gains on these rows only.
    """
    return max(_LEVEL_TOL, _LEVEL_NOISE * k / rows)
