"""Lloyd's step over rows that come in blocks and over several processes: exact sums, and where centroids go next.

Steps are lengthened where that helps (Salakhutdinov and Roweis, "Adaptive overrelaxed bound optimization methods", ICML
2003): a centroid moves `pace` times the way to its mean. The pace grows while the inertia falls; as soon as it rises,
the next step is a plain one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from clustermim.errors import InputError
from clustermim.tokenizers.nearest import FitMetric, nearest_to
from clustermim.tokenizers.neighbourhoods import Neighbourhoods
from clustermim.tokenizers.streams import RowsInMemory, RowStream

Step = dict[str, float | int | str]

_PACES = (1.0, 1.25, 1.5, 1.7)


@dataclass(frozen=True)
class Sums:
    """What one pass over the rows yields for given centroids."""

    sums: Tensor  # (K, D) float64, on the CPU
    counts: Tensor  # (K,) int64, on the CPU
    inertia: float
    worst: Tensor  # (m, D) distinct rows far from their centroids, the farthest first; empty unless asked for

    @property
    def empty(self) -> Tensor:
        """The clusters without rows."""
        return (self.counts == 0).nonzero()[:, 0]


@dataclass
class Progress:
    """Where a series of steps stands, between two of them."""

    steps: int = 0
    before: float = math.inf  # the last inertia
    pace: int = 0  # which of `_PACES` was used for the last step
    worst: int = 0  # rows to remember; only a pass after one with empty clusters pays for that
    reseeded: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


def add_up(
    data: RowStream | RowsInMemory,
    centroids: Tensor,
    metric: FitMetric,
    worst: int,
    *,
    exact_order: bool,
    near: Neighbourhoods | None = None,
) -> Sums:
    """Assign every row once and add up the clusters; keep the `worst` rows of largest error if asked.

    `near`, made of the same rows, assigns them instead of a search among all centroids.

    `exact_order`: float64 sums in the order of the rows, for a CPU. Elsewhere adds are atomic and come in any order,
    so they are made in integers, where order does not matter: each value is rounded to a multiple of 1/scale, far
    below float32's own step.
    """
    k, dim = centroids.shape
    assigned = _assigned(data, centroids, metric) if near is None else near.assigned(centroids, metric)
    counts = torch.zeros(k, dtype=torch.int64)
    sums = torch.zeros(k, dim, dtype=torch.float64 if exact_order else torch.int64, device=centroids.device)
    assert data.num_rows is not None
    scale = whole_units(data)
    far = centroids.new_empty(0, dim)
    far_error = centroids.new_empty(0)
    rows = 0
    for block, ids in assigned:
        counts += torch.bincount(ids, minlength=k).cpu()
        sums.index_add_(0, ids, block.double() if exact_order else (block * scale).round().long())
        rows += len(block)
        if worst:
            error = (block - centroids[ids]).square().sum(1)
            far, far_error = _farthest(torch.cat([far, block]), torch.cat([far_error, error]), worst)
    others = data.processes
    check_count(data, rows)
    if worst:
        far, _ = _farthest(others.join(far), others.join(far_error), worst)
    counts, sums = others.add(counts), others.add(sums)
    exact = sums.cpu().double() / (1.0 if exact_order else scale)
    return Sums(exact, counts, inertia_of(data, centroids, exact, counts), far)


def whole_units(data: RowStream | RowsInMemory) -> float:
    """How many units a 1 is, where sums over all rows are whole numbers of 64 bits: far finer than float32's step."""
    return 2.0 ** min(62 - math.ceil(math.log2(max(data.largest * (data.num_rows or 0), 1e-30))), 100)


def check_count(data: RowStream | RowsInMemory, rows: int) -> None:
    """Check that a pass, of whose rows this process saw so many, had as many as the first one.

    Raises
    ------
    InputError
        It had not.
    """
    found = sum(data.processes.sizes(rows))
    if found != data.num_rows:
        raise InputError(f"The patches changed between two passes: {data.num_rows} at first, {found} now.")


def inertia_of(data: RowStream | RowsInMemory, centroids: Tensor, sums: Tensor, counts: Tensor) -> float:
    """The sum of squared distances of all rows to their centroids, from the sums and counts of the clusters."""
    c = centroids.cpu().double()
    inertia = data.square_sum - 2.0 * float((c * sums).sum()) + float((c.square().sum(1) * counts).sum())
    return max(inertia, 0.0)


def _assigned(data: RowStream | RowsInMemory, centroids: Tensor, metric: FitMetric) -> Iterator[tuple[Tensor, Tensor]]:
    """Each block with the nearest centroids of its rows."""
    search: Callable[[Tensor], Tensor] | None = None
    for block in data():
        search = search or nearest_to(centroids, metric, block.mean(0))
        yield block, search(block)


def _farthest(rows: Tensor, error: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Distinct rows of the largest error, the largest first."""
    order = error.argsort(descending=True, stable=True)
    fresh = torch.ones(len(order), dtype=torch.bool, device=order.device)
    fresh[1:] = error[order[1:]] != error[order[:-1]]  # equal rows have equal errors: one of them will do
    order = order[fresh][:most]
    return rows[order], error[order]


def moved(centroids: Tensor, found: Sums, metric: FitMetric, pace: float = 1.0) -> Tensor:
    """Where the centroids go: `pace` times the way to the means of their clusters.

    An empty cluster stays where it is, or moves to one of the worst rows if there are any.
    """
    used = found.counts > 0
    means = found.sums / found.counts.clamp_min(1)[:, None]
    if metric == "cosine":
        length = found.sums.norm(dim=1)
        used &= length > 0  # rows that cancel out have no direction
        means = found.sums / length.clamp_min(1e-300)[:, None]
    if pace != 1.0:
        here = centroids.cpu().double()
        means = here + pace * (means - here)
        if metric == "cosine":
            means = means / means.norm(dim=1, keepdim=True).clamp_min(1e-300)
    means = means.to(centroids.dtype).to(centroids.device)
    centroids = torch.where(used[:, None].to(centroids.device), means, centroids)
    if not len(found.empty) or not len(found.worst):
        return centroids
    # Farthest first, each pick lowering the error of its neighbours, so that two clusters do not land on one spot.
    others = centroids[used.to(centroids.device)]
    error = (found.worst - others[nearest_to(others, "l2", found.worst.mean(0))(found.worst)]).square().sum(1)
    for slot in found.empty.tolist():
        pick = int(error.argmax())
        if float(error[pick]) <= 0.0:
            break
        centroids[slot] = found.worst[pick]
        error = torch.minimum(error, (found.worst - found.worst[pick]).square().sum(1))
    return centroids


def lloyd_steps(
    data: RowStream | RowsInMemory,
    centroids: Tensor,
    metric: FitMetric,
    most: int,
    tol: float,
    history: list[Step],
    stage: str,
    *,
    progress: Progress | None = None,
    near: Neighbourhoods | None = None,
    after: Callable[[Tensor, Progress], None] = lambda centroids, progress: None,
) -> tuple[Sums, Tensor]:
    """Lloyd steps until the inertia falls by less than `tol` of itself; the centroids are those that were measured.

    Parameters
    ----------
    data
        Rows.
    centroids
        (K, D), where to start or to go on.
    metric
        ``"l2"`` or ``"cosine"``.
    most
        Steps at most, counted from the first, also where `progress` goes on from a later one.
    tol
        Share of the inertia.
    history
        Gets a row a step.
    stage
        For the rows of the history.
    progress
        Where to go on.
    near
        Made of the rows of `data`: from the second step on, rows are compared with centroids near by alone.
    after
        Called after every step but the last with what a checkpoint has to hold.
    """
    now = progress or Progress()
    while True:
        found = add_up(data, centroids, metric, now.worst, exact_order=centroids.device.type == "cpu", near=near)
        empty = len(found.empty)
        mean = found.inertia / max(data.num_rows or 0, 1)
        history.append({"stage": stage, "rows": data.num_rows or 0, "inertia": mean, "empty": empty})
        gain = now.before - found.inertia
        overshot = gain < 0.0 and _PACES[now.pace] > 1.0
        small = now.steps > 0 and gain <= tol * now.before and not overshot
        now.steps += 1
        if (small and (not empty or now.reseeded)) or found.inertia == 0.0 or now.steps >= most:
            return found, centroids
        # A first step on new rows also takes back what was peculiar to the rows before: no longer than needed.
        now.pace = 0 if overshot or now.steps == 1 else min(now.pace + 1, len(_PACES) - 1)
        now.before, now.reseeded = found.inertia, empty > 0 and now.worst > 0
        centroids = moved(centroids, found, metric, _PACES[now.pace])
        now.worst = max(4 * empty, 64) if empty else 0
        after(centroids, now)
