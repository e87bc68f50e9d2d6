"""K-means over a stream of patch features, in memory that does not grow with their number.

The way (Lloyd 1982; Arthur and Vassilvitskii, "k-means++", SODA 2007, with the greedy choice among several draws):

1. One pass takes a seeded random sample, counts the rows and looks for bad values.
2. k-means++ and a few Lloyd steps on a small part of the sample, from several starts; the best goes on.
3. Lloyd steps on parts of the sample that grow fourfold: most of the way is made where a step is cheap.
4. Full passes over all rows, with exact sums, until the inertia hardly falls.

Rows are cut into blocks by their position in the stream and sums are kept in float64 (or in wide fixed point where
atomic adds would lose the order), so the same seed gives the same centroids whatever the batch size.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clustermim.errors import InputError
from clustermim.tokenizers.codebook import Assigner
from clustermim.tokenizers.progress import PassProgress
from clustermim.tokenizers.seeding import plus_plus
from clustermim.tokenizers.streams import Blocks, RowsInMemory, RowStream, draw_sample

FitMetric = Literal["l2", "cosine"]
Step = dict[str, float | int | str]

_LEVEL_STEPS = 60  # at most, on each part of the sample
_START_TOL = 1e-4  # on few rows a step costs next to nothing
_SAMPLE_TOL = 3e-4


@dataclass(frozen=True)
class KMeansResult:
    """Centroids, and how good they are on all rows.

    Parameters
    ----------
    centroids
        (K, D) float32.
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
    """

    centroids: Tensor
    counts: Tensor
    inertia: float
    num_rows: int
    history: list[Step] = field(default_factory=list)


def fit_kmeans(
    blocks: Blocks,
    k: int,
    *,
    metric: FitMetric = "l2",
    seed: int = 0,
    n_init: int | None = None,
    max_passes: int = 20,
    tol: float = 1e-3,
    sample_size: int | None = None,
    progress: bool = False,
) -> KMeansResult:
    """Cluster the rows that `blocks()` yields into k groups.

    Parameters
    ----------
    blocks
        Called once a pass; must yield the same rows in the same order each time, as (n, D) float tensors of any n.
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
        Rows held in memory; None takes 256 a cluster, at least 131,072, at most 512 MB of them.
    progress
        Show a bar on stderr.

    Returns
    -------
    KMeansResult
        On the device of the rows.

    Raises
    ------
    InputError
        k < 2, k larger than the number of distinct rows, rows with NaN or infinity, or no rows at all.
    """
    if k < 2:
        raise InputError(f"K-means with k = {k} tells no patches apart; choose k of at least 2.")
    if metric not in ("l2", "cosine"):
        raise InputError(f"K-means cannot be fitted with metric {metric!r}; choose l2 or cosine.")
    with PassProgress("patches", show=progress) as bar:
        stream = RowStream(blocks, unit=metric == "cosine", bar=bar)
        sample = draw_sample(stream, k, seed, sample_size)
        history: list[Step] = []
        centroids = _fit_sample(sample, k, metric, seed, n_init or (4 if k <= 256 else 1), history)
        data: RowStream | RowsInMemory = stream
        if len(sample) == stream.num_rows:  # all of it is in memory: steps are cheap, and nothing need be made again
            data, tol = RowsInMemory(sample), min(tol, _START_TOL)
        found, centroids = _steps(data, centroids, metric, max(max_passes, 1), tol, history, "full")
    # The most frequent token first: legible pictures, and no trace of the start.
    order = found.counts.argsort(descending=True, stable=True)
    return KMeansResult(
        centroids[order.to(centroids.device)], found.counts[order], found.inertia, stream.num_rows or 0, history
    )


def _fit_sample(
    sample: Float[Tensor, "n d"], k: int, metric: FitMetric, seed: int, n_init: int, history: list[Step]
) -> Float[Tensor, "k d"]:
    """k-means++ starts on a prefix of the sample, then Lloyd steps on prefixes that grow fourfold."""
    rows = min(len(sample), max(32 * k, 1 << 14))
    best: tuple[float, Tensor] | None = None
    part = RowsInMemory(sample[:rows])
    for start in range(n_init):
        seeds = plus_plus(sample[: min(rows, max(16 * k, 1 << 12))], k, seed, start)
        found, centroids = _steps(part, seeds, metric, _LEVEL_STEPS, _START_TOL, history, "start")
        if best is None or found.inertia < best[0]:
            best = found.inertia, centroids
    assert best is not None
    centroids = best[1]
    while rows < len(sample):
        rows = min(4 * rows, len(sample))
        part = RowsInMemory(sample[:rows])
        _, centroids = _steps(part, centroids, metric, _LEVEL_STEPS, _SAMPLE_TOL, history, "sample")
    return centroids


@dataclass(frozen=True)
class _Sums:
    """What one pass over the rows yields for given centroids."""

    sums: Tensor  # (K, D) float64, on the CPU
    counts: Tensor  # (K,) int64, on the CPU
    inertia: float
    worst: Tensor  # (m, D) distinct rows far from their centroids, the farthest first; empty unless asked for

    @property
    def empty(self) -> Tensor:
        return (self.counts == 0).nonzero()[:, 0]


def add_up(
    data: RowStream | RowsInMemory, centroids: Tensor, metric: FitMetric, worst: int, *, exact_order: bool
) -> _Sums:
    """Assign every row once and add up the clusters; keep the `worst` rows of largest error if asked.

    `exact_order`: float64 sums in the order of the rows, for a CPU. Elsewhere adds are atomic and come in any order,
    so they are made in integers, where order does not matter: each value is rounded to a multiple of 1/scale, far
    below float32's own step.
    """
    k, dim = centroids.shape
    assign = Assigner(centroids, metric)
    counts = torch.zeros(k, dtype=torch.int64)
    sums = torch.zeros(k, dim, dtype=torch.float64 if exact_order else torch.int64, device=centroids.device)
    assert data.num_rows is not None
    scale = 2.0 ** min(62 - math.ceil(math.log2(max(data.largest * data.num_rows, 1e-30))), 100)
    far = centroids.new_empty(0, dim)
    far_error = centroids.new_empty(0)
    rows = 0
    for block in data():
        ids = assign(block)
        counts += torch.bincount(ids, minlength=k).cpu()
        sums.index_add_(0, ids, block.double() if exact_order else (block * scale).round().long())
        rows += len(block)
        if worst:
            error = torch.cat([far_error, (block - centroids[ids]).square().sum(1)])
            order = error.argsort(descending=True, stable=True)
            fresh = torch.ones(len(order), dtype=torch.bool, device=order.device)
            fresh[1:] = error[order[1:]] != error[order[:-1]]  # equal rows have equal errors: one of them will do
            order = order[fresh][:worst]
            far, far_error = torch.cat([far, block])[order], error[order]
    if rows != data.num_rows:
        raise InputError(f"The patches changed between two passes: {data.num_rows} at first, {rows} now.")
    exact = sums.cpu().double() / (1.0 if exact_order else scale)
    c = centroids.cpu().double()
    inertia = data.square_sum - 2.0 * float((c * exact).sum()) + float((c.square().sum(1) * counts).sum())
    return _Sums(exact, counts, max(inertia, 0.0), far)


def _updated(centroids: Tensor, found: _Sums, metric: FitMetric) -> Tensor:
    """The means of the clusters; an empty one stays where it is, or moves to one of the worst rows if there are any."""
    used = found.counts > 0
    means = found.sums / found.counts.clamp_min(1)[:, None]
    if metric == "cosine":
        length = found.sums.norm(dim=1)
        used &= length > 0  # rows that cancel out have no direction
        means = found.sums / length.clamp_min(1e-300)[:, None]
    means = means.float().to(centroids.device)
    centroids = torch.where(used[:, None].to(centroids.device), means, centroids)
    empty = found.empty
    if not len(empty) or not len(found.worst):
        return centroids
    # Farthest first, each pick lowering the error of its neighbours, so that two clusters do not land on one spot.
    others = centroids[used.to(centroids.device)]
    error = _least_distance(found.worst, others)
    for slot in empty.tolist():
        pick = int(error.argmax())
        if float(error[pick]) <= 0.0:
            break
        centroids[slot] = found.worst[pick]
        error = torch.minimum(error, (found.worst - found.worst[pick]).square().sum(1))
    return centroids


def _least_distance(rows: Tensor, centroids: Tensor) -> Tensor:
    ids = Assigner(centroids)(rows)
    return (rows - centroids[ids]).square().sum(1)


def _steps(
    data: RowStream | RowsInMemory,
    centroids: Tensor,
    metric: FitMetric,
    most: int,
    tol: float,
    history: list[Step],
    stage: str,
) -> tuple[_Sums, Tensor]:
    """Lloyd steps until the inertia falls by less than `tol` of itself; the centroids are those that were measured."""
    before = math.inf
    reseeded = False
    worst = 0  # rows to remember; only a pass after one with empty clusters pays for that
    for step in range(most):
        found = add_up(data, centroids, metric, worst, exact_order=centroids.device.type == "cpu")
        empty = len(found.empty)
        mean = found.inertia / max(data.num_rows or 0, 1)
        history.append({"stage": stage, "rows": data.num_rows or 0, "inertia": mean, "empty": empty})
        settled = step > 0 and before - found.inertia <= tol * before and (not empty or reseeded)
        if settled or found.inertia == 0.0 or step + 1 == most:
            break
        before, reseeded = found.inertia, empty > 0 and worst > 0
        centroids = _updated(centroids, found, metric)
        worst = max(4 * empty, 64) if empty else 0
    return found, centroids
