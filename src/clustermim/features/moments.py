"""Means, variances and covariances of patch features over a stream, in memory that does not grow with it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from clustermim.errors import InputError

ImagePasses = Callable[[], Iterable[Tensor]]
"""Called once a pass; yields (b, C, H, W) batches of the training images, the same in each pass, on one device."""

BLOCK = 4096
"""Rows that are multiplied at once; fixed, so that the caller's batches decide nothing."""

SPREAD_ROWS = 1 << 17
"""Rows after which a variance is known well enough."""


class Moments:
    """Number, mean and covariance of rows that come in parts, in float64.

    Rows are gathered into blocks by their position, so how they are cut into parts changes nothing. Where a process
    group is up, the processes' rows are put together.

    Parameters
    ----------
    dim
        D, columns of each row.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.rows = 0
        self._held: list[Tensor] = []
        self._waiting = 0
        self._total = torch.zeros(dim, dtype=torch.float64)
        self._products = torch.zeros(dim, dim, dtype=torch.float64)
        self._low = torch.full((dim,), float("inf"), dtype=torch.float64)
        self._high = -self._low

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        """Take more rows in."""
        self._held.append(rows)
        self._waiting += len(rows)
        if self._waiting < BLOCK:
            return
        joined = torch.cat(self._held)
        whole = len(joined) - len(joined) % BLOCK
        for block in torch.split(joined[:whole], BLOCK):
            self._take(block)
        self._held, self._waiting = [joined[whole:].clone()], len(joined) - whole

    def _take(self, block: Float[Tensor, "n d"]) -> None:
        if block.device.type == "mps":
            block = block.cpu()  # that device has no float64
        if self._products.device != block.device:
            for name in ("_total", "_products", "_low", "_high"):
                setattr(self, name, getattr(self, name).to(block.device))
        exact = block.double()
        self.rows += len(exact)
        self._total += exact.sum(0)
        self._products.addmm_(exact.T, exact)
        self._low = torch.minimum(self._low, exact.amin(0))
        self._high = torch.maximum(self._high, exact.amax(0))

    def finish(self, spec: str) -> None:
        """No more rows come; from here on `mean`, `covariance` and `constant` may be asked for.

        Parameters
        ----------
        spec
            Of the features, for the error messages.

        Raises
        ------
        InputError
            There were no rows, or some hold NaN or infinity.
        """
        if self._waiting:
            self._take(torch.cat(self._held))
            self._held, self._waiting = [], 0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            count = torch.tensor(float(self.rows), dtype=torch.float64, device=self._total.device)
            for sums in (count, self._total, self._products):
                dist.all_reduce(sums)
            dist.all_reduce(self._low, op=dist.ReduceOp.MIN)
            dist.all_reduce(self._high, op=dist.ReduceOp.MAX)
            self.rows = int(count)
        if not self.rows:
            raise InputError(f"Features `{spec}` cannot be fitted: there are no patches to look at.")
        if not bool(torch.isfinite(self._products).all()):
            raise InputError(
                f"Features `{spec}` cannot be fitted: they hold NaN or infinity. Look at the images, or at the weights "
                "of the feature network."
            )

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean row, float64 on the CPU."""
        return (self._total / self.rows).cpu()

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Mean product of deviations, float64 on the CPU; rows and columns of constant dimensions are exactly 0."""
        mean = self._total / self.rows
        found = (self._products / self.rows - mean[:, None] * mean).cpu()
        varies = (~self.constant).double()
        return found * varies[:, None] * varies

    @property
    def constant(self) -> Tensor:
        """(D,) bool on the CPU: which dimensions never differ."""
        return (self._low == self._high).cpu()


class Spread:
    """Variance of each dimension, cheaply: exactly whether it is constant, its size from every so many rows.

    Parameters
    ----------
    dim
        D.
    expected_rows
        How many rows will come, about; decides how many are left out.
    """

    def __init__(self, dim: int, expected_rows: int) -> None:
        self._step = max(1, expected_rows // SPREAD_ROWS)
        self.rows = self._used = 0
        self._first: Tensor | None = None
        self.constant = torch.ones(dim, dtype=torch.bool)
        """(D,) on the CPU: which dimensions had the same value in all rows so far."""
        self._total = self._squares = torch.zeros(dim, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        """Take more rows in."""
        if not len(rows):
            return
        if self._first is None:
            self._first = rows[0].clone()
        if bool(self.constant.any()):  # after the first rows, of a few dimensions or of none
            still = self.constant.nonzero()[:, 0]
            here = still.to(rows.device)
            self.constant[still] = (rows[:, here] == self._first[here]).all(0).cpu()
        deviation = rows[-self.rows % self._step :: self._step].cpu().double() - self._first.cpu().double()
        self.rows += len(rows)
        self._used += len(deviation)
        self._total = self._total + deviation.sum(0)
        self._squares = self._squares + deviation.square().sum(0)

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Variance of each dimension, float64 on the CPU; exactly 0 for constant ones only."""
        if not self._used:
            return torch.zeros_like(self._total)
        found = self._squares / self._used - (self._total / self._used).square()
        return found.clamp_min(torch.finfo(torch.float64).tiny).masked_fill(self.constant, 0.0)

    def share(self) -> None:
        """Put the rows of all processes together, after the last of them; alone this does nothing."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1) or self._first is None:
            return
        first = self._first.cpu().double()
        mine = (first, self.rows, self._used, self._total, self._squares, self.constant)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        self._first, self.constant = parts[0][0], torch.stack([part[5] for part in parts]).all(0)
        self.rows, self._used = sum(part[1] for part in parts), sum(part[2] for part in parts)
        self._total = self._squares = torch.zeros_like(first)
        for start, _, used, total, squares, _ in parts:
            shift = start - parts[0][0]  # deviations were taken from each process's own first row
            self.constant = self.constant & (shift == 0)
            self._squares = self._squares + squares + 2.0 * shift * total + used * shift.square()
            self._total = self._total + total + used * shift

    def check(self, spec: str) -> None:
        """Refuse features that describe all patches alike.

        Raises
        ------
        InputError
            No dimension varies.
        """
        if self.rows and bool(self.constant.all()):
            raise no_variance(spec, self.rows)

    def facts(self) -> dict[str, Any]:
        """For a tokenizer's config: variance of each dimension to four digits, and the numbers of the constant ones.

        Empty where no rows came, for then nothing is known.
        """
        if not self.rows:
            return {}
        return {
            "feature_variance": [float(f"{value:.4g}") for value in self.variance.tolist()],
            "constant_dimensions": self.constant.nonzero()[:, 0].tolist(),
        }


def no_variance(spec: str, patches: int) -> InputError:
    """The error for features that describe all patches alike."""
    return InputError(
        f"Features `{spec}` have no variance: all {patches:,} patches are described by the same numbers, so there is "
        "nothing to tell them apart by. Are the images empty or of one colour? Otherwise choose other --features."
    )
