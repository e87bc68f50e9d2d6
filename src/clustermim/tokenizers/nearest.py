"""The nearest of all centroids while they are being fitted: fast, and as exact as the precision of the rows allows."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clustermim.tokenizers.assigning import Assigner

FitMetric = Literal["l2", "cosine"]

_SCORES = 1 << 19  # alive at once: what a core's cache holds
_GROUPED_FROM = 512  # from so many centroids on, a maximum in two steps pays


def nearest_to(
    centroids: Float[Tensor, "k d"], metric: FitMetric, around: Float[Tensor, " d"]
) -> Callable[[Tensor], Tensor]:
    """The search for the nearest centroid while fitting: one product and a maximum, in the precision of the rows.

    Fitting needs no exact ids as tokenizing does: rows that rounding puts on the wrong side of a border lie on it. On a
    CPU and raw pixels that saves more than half of a pass. Elsewhere `Assigner` is as fast. `around` is where the rows
    are: taken as the origin, it keeps their products small, and with them the digits that tell near centroids apart.
    """
    if centroids.device.type != "cpu":
        return Assigner(centroids, metric)
    k = len(centroids)
    shift = around if metric == "l2" else torch.zeros_like(around)
    c = centroids - shift
    bias = c.square().sum(1).mul(-0.5) if metric == "l2" else c.new_zeros(k)
    group = 1 << round(math.log2(k) / 2) if k >= _GROUPED_FROM else 0
    if group:  # groups of neighbours lie at a fixed stride, so that their maximum vectorises
        missing = -k % group
        c = torch.cat([c, c.new_zeros(missing, c.shape[1])]).view(-1, group, c.shape[1]).transpose(0, 1).flatten(0, 1)
        bias = torch.cat([bias, bias.new_full((missing,), -math.inf)]).view(-1, group).t().flatten()
    columns = c.t().contiguous()
    step = max(_SCORES // k, 128)
    room = c.new_empty(step, columns.shape[1])  # one for all parts: fresh memory costs as much as the maximum
    places = torch.arange(step)

    def assign(rows: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        ids = torch.empty(len(rows), dtype=torch.int64)
        for start in range(0, len(rows), step):
            part = rows[start : start + step] - shift
            scores = torch.addmm(bias, part, columns, out=room[: len(part)])
            found = ids[start : start + step]
            if not group:
                found.copy_(scores.max(1).indices)
                continue
            spread = scores.view(len(part), group, -1)
            best = spread.amax(1).max(1).indices
            inside = spread[places[: len(part)], :, best].max(1).indices
            torch.add(inside, best, alpha=group, out=found)
        return ids

    return assign
