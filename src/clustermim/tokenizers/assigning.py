"""Which of K centroids is nearest: one matrix product and a minimum for each block of rows, and ids that are exact.

Half the squared distance of row x to centroid c is, up to a part that all centroids share, |c|²/2 − x·c, so a block of
rows is one matrix product. Products in float32, and the more so in bfloat16, round; but by how much is bounded, and
only centroids whose score lies within the bound of the best can be the nearest. Where one is left, that is the answer;
where several are left, their distances are computed again from differences in float64. So the ids are those of exact
arithmetic, whatever computed the products, and do not depend on blocks, threads or devices.

The bound. Let y be a shifted row, ŷ and ĉ what the products see of it and of c, E the length of the sums, u the unit
roundoff of accumulation. By Cauchy and Schwarz,

    |y·c − ŷ·ĉ| ≤ |y| |c − ĉ| + |y − ŷ| |ĉ|,

with the lengths of the actual differences, which are measured, not estimated. Accumulation adds at most E·u times the
sum of the absolute terms (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1), and a bfloat16
result is rounded by a share of 2⁻⁸ of itself. A term common to a row, |y|²/2, keeps all scores positive and small near
the best: then this share is one of the squared distance, and bfloat16 scores may be compared as the integers whose bits
they are, which processors do much faster.

Which of the two products is used is decided by a stopwatch on the first blocks: it is a matter of speed only.
"""

import math
import threading
import time
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from clustermim.products import linear, multiplies_bfloat16

Metric = Literal["l2", "cosine", "dot"]
Products = Literal["auto", "float32", "bfloat16"]

_SCORES = 1 << 19  # of one product on a CPU: what stays in a core's cache
_PARTS = 4  # products of a block: what else is done with its rows costs as much for few of them as for many
_DEVICE_SCORES = 1 << 26
_ROWS = 8192  # of a block, at most
_FLAT = 160  # up to so many centroids, all scores are searched at once; above, group by group
_ABSOLUTE = 2.0**-60  # what underflow may do to a score, in units of the largest centroid
_FAR = 2.0**40  # rows farther out than this, in the same units, are computed exactly from the start
_EXACT = 1 << 20  # float64 numbers alive at once in exact computations

_TRIALS = 3  # blocks with either product before the faster is chosen
_SLOWER = 1.2  # times float32's time; bfloat16 that takes longer on so many blocks running is given up
_seconds: dict[tuple[object, ...], dict[str, list[float]]] = {}  # per row, by what was computed where


class Assigner:
    """Assigns rows to the nearest of fixed centroids; what depends on centroids alone is made once.

    Parameters
    ----------
    centroids
        (K, D) float, on the device where rows will come.
    metric
        ``"l2"``: least distance. ``"cosine"`` and ``"dot"``: largest inner product (for ``"cosine"`` the centroids are
        taken as unit vectors; the length of a row does not matter to its token).
    products
        What is multiplied: ``"float32"``, ``"bfloat16"``, or ``"auto"``, the faster here. The ids are the same.
    """

    def __init__(self, centroids: Float[Tensor, "k d"], metric: Metric = "l2", products: Products = "auto") -> None:
        self.size, self.dim = centroids.shape
        self.metric = metric
        self.device = centroids.device
        self._exact_device = torch.device("cpu") if self.device.type == "mps" else self.device  # mps has no float64
        self._centroids = centroids.detach().float().to(self._exact_device)
        self._group = 1 if self.size <= _FLAT else 1 << round(math.log2(self.size) / 2)
        self._groups = math.ceil(self.size / self._group)
        budget = _DEVICE_SCORES if self.device.type == "cuda" else _SCORES
        rows = max(budget // (self._group * self._groups), 256)
        self.rows = 1 << min(rows.bit_length() - 1, 20 if self.device.type == "cuda" else _ROWS.bit_length() - 1)
        exact = self._centroids.double()
        self._shift = _coarse_mean(exact) if metric == "l2" else torch.zeros_like(exact[0])
        largest = float((exact - self._shift).norm(dim=1).max())
        exponent = -math.floor(math.log2(largest)) if largest > 0.0 else 0
        self._scale = 2.0 ** min(max(exponent, -120), 120)  # a power of two is exact
        self._offset = (-self._scale * self._shift).float().to(self.device)
        self._parts = _PARTS if self.device.type == "cpu" and self._group > 1 else 1
        self._fixed = products != "auto"
        self._late = 0  # blocks running that took longer than they should
        self._tables: dict[str, _Table] = {}
        self._products: str | None = None if products == "auto" else products
        if products == "auto" and self.device.type == "cpu" and not multiplies_bfloat16():
            self._products = "float32"

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        """The id of the nearest centroid of each row; a tie goes to the lower id. A row with NaN gets id 0."""
        ids = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if self.size == 1:
            return ids
        with torch.autocast(x.device.type, enabled=False):
            for start, stop in self._cuts(len(x)):
                ids[start:stop] = self._timed(x[start:stop].float())
        return ids

    def _cuts(self, n: int) -> Iterator[tuple[int, int]]:
        """Where blocks begin and end: as many whole products as a block may have, then what is left over."""
        whole, start = n - n % self.rows, 0
        while start < whole:
            stop = min(start + self._parts * self.rows, whole)
            yield start, stop
            start = stop
        if start < n:
            yield start, n

    @torch.no_grad()
    def nearest(self, x: Float[Tensor, "n d"], count: int) -> Int64[Tensor, "n count"]:
        """The ids of the `count` nearest centroids of each row, in no particular order; ties go to the lower ids.

        Exact as a set, like the nearest one.
        """
        if count == 1:
            return self(x)[:, None]
        if count >= self.size:
            return torch.arange(self.size, device=x.device).expand(len(x), -1)
        ids = torch.empty(len(x), count, dtype=torch.int64, device=x.device)
        table = self._table("float32")
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), self.rows):
                block = x[start : start + self.rows].float()
                ((scores, least, limit),) = table.scores(block)
                found = scores.t().contiguous().topk(count + 1, dim=1, largest=False)
                here = found.indices[:, :count]
                # The set is certain where what follows it is farther than rounding reaches. The limit grows with the
                # score it is made for, so the distance of the two is taken at the larger of both.
                last, after = found.values[:, count - 1], found.values[:, count]
                reach = (limit - least.amin(0)) + 2.0**-22 * last.abs()
                unsure = (~(after - last > reach) | ~torch.isfinite(limit)).nonzero()[:, 0]
                for rows in torch.split(unsure, max(_EXACT // (self.size * self.dim), 1)):
                    far = self.exact_distances(block[rows], self._centroids[None], self.metric)
                    here[rows] = far.argsort(dim=1, stable=True)[:, :count]
                ids[start : start + len(block)] = here
        return ids

    @staticmethod
    def exact_distances(x: Float[Tensor, "n d"], c: Float[Tensor, "m k d"], metric: Metric) -> Float64[Tensor, "n k"]:
        """What is least at the nearest centroid, in float64, for rows with K centroids of their own or in common."""
        where = torch.device("cpu") if x.device.type == "mps" else x.device  # which has no float64
        x, c = x.to(where).double()[:, None], c.to(where).double()
        return (x - c).square_().sum(-1) if metric == "l2" else -(x * c).sum(-1)

    def _timed(self, block: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        """Search with the chosen product; while none is, with either in turn, under a stopwatch."""
        if self._products is not None:
            return self._watched(block, self._products)
        if len(block) < self.rows or self.device.type not in ("cpu", "cuda"):
            return self._search(block, "float32")  # too little to learn from
        taken = _seconds.setdefault(self._key, {"float32": [], "bfloat16": []})
        products = min(taken, key=lambda name: len(taken[name]))
        self._table(products)  # made before the clock runs
        started = time.perf_counter()
        ids = self._search(block, products)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        taken[products].append((time.perf_counter() - started) / len(block))
        slow, fast = min(taken["bfloat16"], default=0.0), min(taken["float32"])
        hopeless = slow > 5.0 * fast and slow * len(block) > 0.02  # a processor that has to imitate bfloat16
        if hopeless or len(taken["bfloat16"]) >= _TRIALS:
            self._products = "float32" if slow >= fast else "bfloat16"
        return ids

    def _watched(self, block: Float[Tensor, "n d"], products: str) -> Int64[Tensor, " n"]:
        """Search with the product that was faster on other rows, until it turns out not to be on these."""
        known = _seconds.get(self._key, {}).get("float32")
        if self._fixed or products != "bfloat16" or not known or self.device.type != "cpu":
            return self._search(block, products)
        started = time.perf_counter()
        ids = self._search(block, products)
        late = time.perf_counter() - started > _SLOWER * min(known) * len(block)
        self._late = self._late + 1 if late else 0
        if self._late >= _TRIALS:
            self._products = "float32"
        return ids

    @property
    def _key(self) -> tuple[object, ...]:
        return self.device, torch.get_num_threads(), self.metric, self.size, self.dim

    def _table(self, products: str) -> "_Table":
        if products not in self._tables:
            self._tables[products] = _Table(self, products == "bfloat16")
        return self._tables[products]

    def _search(self, block: Float[Tensor, "n d"], products: str) -> Int64[Tensor, " n"]:
        """The ids of a block: scores, then the candidates within the bound, then exact distances where several are."""
        table = self._table(products)
        ids = torch.zeros(len(block), dtype=torch.int64, device=block.device)
        open_rows = None
        if self._group == 1:
            ((scores, _, limit),) = table.scores(block)
            # A row with one hit: its id is the sum of the hits' ids, and sums of integers down the columns are fast.
            hits = torch.le(scores, limit, out=table.room("hits", *scores.shape).view(scores.dtype))
            count = hits.sum(0, dtype=hits.dtype)
            ids.copy_(hits.mul_(table.numbers).sum(0, dtype=hits.dtype))
            open_rows = (count != 1).nonzero()[:, 0]
            if not len(open_rows):
                return ids
            if table.coarse and 2 * len(open_rows) > len(block):
                return self._searched_again(block)
            found = (scores.index_select(1, open_rows) <= limit[open_rows]).nonzero()
            row, candidate = open_rows[found[:, 1]], found[:, 0]
        else:
            rows, candidates, seen = [], [], 0
            for scores, least, limit in table.scores(block, max(len(block) // self.rows, 1)):
                found = (least <= limit).nonzero()
                if table.coarse and 4 * len(found) > (self._groups + 16) * len(limit):
                    return self._searched_again(block)
                group, place = found.unbind(1)
                spread = scores.view(self._groups, self._group, -1)[group, :, place]
                pair, inside = (spread <= limit[place, None]).nonzero().unbind(1)
                rows.append(place[pair] + seen)
                candidates.append(group[pair] * self._group + inside)
                seen += len(limit)
            row, candidate = torch.cat(rows), torch.cat(candidates)
        count = torch.bincount(row, minlength=len(block))
        several = count[row] > 1
        ids[row] = candidate
        row, candidate = row[several], candidate[several]
        if len(row):
            best, winner = self._nearest_of(block, row, candidate)
            ids = torch.where(best, winner, ids)
        # Rows without any candidate: too far out for the bound, or not finite.
        lost = (count == 0).nonzero()[:, 0] if open_rows is None else open_rows[count[open_rows] == 0]
        if len(lost):
            ids[lost] = self._brute(block[lost])
        return ids

    def _searched_again(self, block: Tensor) -> Tensor:
        """The ids of a block where bfloat16 left too many candidates; that tells more than its being late."""
        self._late += 1
        return self._search(block, "float32")

    def _nearest_of(self, block: Tensor, row: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows have exact candidates, and the nearest of them, the lowest id among equals."""
        x = block.to(self._exact_device)
        row, candidate = row.to(x.device), candidate.to(x.device)
        chunk = max(_EXACT // self.dim, 1)
        pairs = zip(torch.split(row, chunk), torch.split(candidate, chunk), strict=True)
        distance = torch.cat([self._distance(x[r].double(), self._centroids[c].double()) for r, c in pairs])
        least = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
        least.scatter_reduce_(0, row, distance, "amin")
        first = torch.full((len(x),), self.size, dtype=torch.int64, device=x.device)
        wins = distance <= least[row]
        first.scatter_reduce_(0, row[wins], candidate[wins], "amin")
        return (first < self.size).to(block.device), first.to(block.device)

    def _distance(self, x: Tensor, c: Tensor) -> Tensor:
        """What is least at the nearest centroid, in float64; each pair by itself, so that no neighbour changes it."""
        return (x - c).square_().sum(-1) if self.metric == "l2" else -(x * c).sum(-1)

    def _brute(self, x: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        """The same for all centroids; rows of zeros have no direction, and all inner products are equal."""
        x = x.to(self._exact_device)
        ids = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        todo = torch.isfinite(x).all(1)
        if self.metric != "l2":
            todo &= (x != 0).any(1)
        chunk = max(_EXACT // (self.size * self.dim), 1)
        c = self._centroids.double()
        for rows in torch.split(todo.nonzero()[:, 0], chunk):
            ids[rows] = self._distance(x[rows, None].double(), c).argmin(1)
        return ids.to(self.device)


class _Table:
    """Centroids as one of the two products sees them, and the bound on what it rounds.

    Columns beside the D features: |c|²/2, in bfloat16 as a sum of two numbers, and there the row's own term as well.
    """

    def __init__(self, owner: Assigner, coarse: bool) -> None:
        self.coarse = coarse
        self.l2 = owner.metric == "l2"
        self._scale, self._offset, self._group = owner._scale, owner._offset, owner._group
        exact = (owner._centroids.double() - owner._shift) * owner._scale
        half = 0.5 * exact.square().sum(1) if self.l2 else exact.new_zeros(owner.size)
        dtype = torch.bfloat16 if coarse else torch.float32
        seen = exact.float().to(dtype)
        parts = [half.float().to(dtype)]
        if coarse:
            parts.append((half - parts[0].double()).float().to(dtype))
        self._half_error = float((half - torch.stack(parts).double().sum(0)).abs().max())
        self._half_length = float(half.max())
        self._error = float((exact - seen.double()).norm(dim=1).max())  # |c − ĉ|
        self._length = float(seen.double().norm(dim=1).max())  # |ĉ|
        ones = [torch.ones_like(parts[0])] * 2 if coarse else []
        columns = torch.cat([-seen, torch.stack(parts + ones, 1)], 1)
        padding = columns.new_zeros(owner._group * owner._groups - owner.size, columns.shape[1])
        padding[:, owner.dim] = math.inf  # never the nearest
        self._columns = torch.cat([columns, padding]).to(owner.device)
        self.numbers = torch.arange(len(self._columns), device=owner.device)[:, None]
        self.numbers = self.numbers.to(torch.int16 if coarse else torch.float32)
        self._rooms = threading.local()

    def room(self, name: str, *shape: int) -> Tensor:
        """Memory for a result of this shape and the dtype of the product, the same at each call of a thread.

        Fresh memory would be handed back to the system after each block, and a processor takes longer to get so many
        pages again than to multiply.
        """
        wanted = math.prod(shape)
        held: Tensor | None = getattr(self._rooms, name, None)
        if held is None or len(held) < wanted:
            held = torch.empty(wanted, dtype=self._columns.dtype, device=self._columns.device)
            setattr(self._rooms, name, held)
        return held[:wanted].view(shape)

    def scores(self, block: Float[Tensor, "n d"], parts: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Scores (padded K, m), least at the nearest; their least in each group (groups, m); a limit for each row (m,).

        Rows come in `parts` of one size m, each with a product of its own, whose scores take the place of those before.
        The nearest centroid's score is at most the limit. All are float32, or int16 that are ordered alike. Rows that
        cannot be bounded get a limit below all scores.
        """
        n, dim = block.shape
        wide = self.room("rows", n, self._columns.shape[1])
        wide[:, dim : dim + 2] = 1.0
        y = torch.empty_like(block) if self.coarse else wide[:, :dim]
        length, fine = self._shifted(block, y)
        slack = 1.0 + (dim + 8) * 2.0**-22  # of the lengths themselves
        seen_error = 2.0**-22 * length  # |y − ŷ|; so far the rounding of the shift or the division
        own: Tensor | float = 0.0
        if self.coarse:
            wide[:, :dim] = y
            if len(self._columns) > _FLAT:
                seen_error = seen_error + torch.linalg.vector_norm(y.sub_(wide[:, :dim]), dim=1)
            else:  # where products are so short, measuring costs more than it saves
                seen_error = seen_error + 2.0**-8 * length
            own = (0.5 * length.square() if self.l2 else length * self._length) * (slack + 2.0**-15)
        unit = 2.0 ** (-22 if self.coarse or block.device.type != "cpu" else -23)  # matrix units truncate
        summed = length * self._length + self._half_length + own
        bound = length * self._error + seen_error * self._length + (dim + 6) * unit * summed
        bound = slack * (bound + self._half_error + _ABSOLUTE)
        if self.coarse:
            own = own + 2.0 * bound  # so that no score falls below zero
            wide[:, dim + 2] = own
            wide[:, dim + 3] = own - wide[:, dim + 2]
        else:
            bound = bound + _shortened() * (2.0 * length * self._length + self._half_length)
        pieces = (torch.split(t, n // parts) for t in (wide, 2.0 * bound, fine))
        for rows, reach, sure in zip(*pieces, strict=True):
            scores = self._products(rows)
            if not self.coarse:
                least = self._of_groups(scores)
                best = least.amin(0)
                yield scores, least, torch.where(sure, best + (reach + 2.0**-22 * best.abs()), -math.inf)
                continue
            # Positive numbers in bfloat16 are ordered as the integers of their bits.
            scores = scores.view(torch.int16)
            least = self._of_groups(scores)
            best = least.amin(0).view(torch.bfloat16).float()
            share = 1.01 * 2.0**-8
            limit = (best * (1.0 + share) + reach) * ((1.0 + 2.0**-20) / (1.0 - share))
            bits = ((limit.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16)  # to bfloat16, upwards
            yield scores, least, torch.where(sure, bits, -1)

    def _products(self, rows: Tensor) -> Tensor:
        """Of all centroids with rows: (padded K, m). oneDNN takes memory of its own and is the faster for all that."""
        if not self.coarse and rows.device.type == "cpu":
            return linear(self._columns, rows)
        return torch.mm(self._columns, rows.t(), out=self.room("scores", len(self._columns), len(rows)))

    def _shifted(self, block: Float[Tensor, "n d"], y: Tensor) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """Rows in the centroids' frame, or of unit length, into `y`; their lengths; which can be bounded."""
        if self.l2:
            torch.add(self._offset, block, alpha=self._scale, out=y)
            length = torch.linalg.vector_norm(y, dim=1)
            fine = length < _FAR
        else:
            length = torch.linalg.vector_norm(block, dim=1)
            fine = (length > 1e-15) & (length < 1e15)
            torch.div(block, length[:, None], out=y)
            length = torch.ones_like(length)
        if not bool(fine.all()):
            y[~fine] = 0.0
            length = torch.where(fine, length, 0.0)
        return length, fine

    def _of_groups(self, scores: Tensor) -> Tensor:
        """The least of each group of neighbouring centroids."""
        return scores if self._group == 1 else scores.view(-1, self._group, scores.shape[1]).amin(1)


def _shortened() -> float:
    """The roundoff of factors, where the user lets float32 products be computed from shorter numbers."""
    try:
        shorter = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was set by backend, which this question does not cover
        shorter = True
    return 2.0**-8 if shorter else 0.0


def _coarse_mean(c: Float64[Tensor, "k d"]) -> Float64[Tensor, " d"]:
    """The mean, rounded to a power of two near the spread, so that float32 rows are mostly shifted without rounding."""
    mean = c.mean(0)
    spread = float((c - mean).square().mean().sqrt())
    step = 2.0 ** math.floor(math.log2(spread)) if spread > 0.0 else 1.0
    return ((mean / step).round() * step).float().double()
