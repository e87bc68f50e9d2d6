"""Where K-means starts: greedy k-means++ on a small sample."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from clustermim.data.counted import Stream, uniform


def plus_plus(rows: Float[Tensor, "n d"], k: int, seed: int, start: int) -> Float[Tensor, "k d"]:
    """Greedy k-means++: of 2 + ln k draws, each proportional to the squared distance, keep the one that helps most."""
    x = rows - rows.mean(0)
    squares = x.square().sum(1)
    draws = 2 + int(math.log(k))
    chance = uniform(seed, Stream.INIT, start, torch.arange(k * draws)).view(k, draws).double()
    chosen = [int(chance[0, 0] * len(x))]
    best = _distances(x, squares, x[chosen], squares[chosen])[:, 0]
    for step in range(1, k):
        ladder = best.double().cumsum(0)
        heights = chance[step].to(ladder.device) * ladder[-1]
        picks = torch.searchsorted(ladder, heights, right=True).clamp_(max=len(x) - 1)
        nearer = torch.minimum(_distances(x, squares, x[picks], squares[picks]), best[:, None])
        winner = int(nearer.sum(0).argmin())
        chosen.append(int(picks[winner]))
        best = nearer[:, winner].contiguous()
    return rows[chosen]


def _distances(x: Tensor, squares: Tensor, c: Tensor, c_squares: Tensor) -> Tensor:
    """Squared distances (n, m); what rounding leaves between equal rows becomes 0, so that no row is drawn twice."""
    scale = squares[:, None] + c_squares
    found = torch.addmm(scale, x, c.t(), alpha=-2.0)
    return torch.where(found > 1e-6 * scale, found, 0.0)
