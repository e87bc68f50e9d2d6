"""Merging a fine vocabulary into a coarse one so that it keeps as much alignment with classes as can be kept.

With R[i, c] patches of fine token i in class c, r_i and n_c its sums, n the total, p_c = n_c / n, T[i, c] = R[i, c]/r_i
and u_i = D_p^−½ (T_i − p), alignment is 1 − ‖I − S‖² / (L − 1) with S = √p√pᵀ + Σ_i (r_i/n) u_i u_iᵀ (docs/theory.md).
Merging tokens i and j takes v vᵀ from S, where v = √(w_i w_j / (w_i + w_j)) (u_i − u_j) and w = r / n, and so costs

    Δ(i, j) = [2 vᵀ (I − S) v + ‖v‖⁴] / (L − 1),

which is Ward's criterion (Ward 1963) in the alignment's own metric I − S. The metric grows by v vᵀ with every merge, so
the cost of a pair that is left alone never falls: costs computed earlier are lower bounds, and the cheapest pair is
found by looking again only at the few rows whose bound is lowest.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from clustermim.errors import InputError

PRIOR_WEIGHTS = np.concatenate([[0.0], np.geomspace(1.0, 1e6, 49)])
"""Patches' worth of class prior that are tried."""
_LLOYD_PASSES = 50
_GAIN = 1e-12


@dataclass(frozen=True, kw_only=True)
class Merging:
    """A partition of fine tokens."""

    groups: Int64[np.ndarray, " fine"]
    """Group of each fine token, in [0, k), the most frequent first; −1 for tokens without a patch."""
    fine: float
    """Alignment of the fine tokens, class shares drawn to the prior."""
    kept: float
    """Alignment of the groups, class shares drawn to the prior."""


def merge_tokens(counts: Float64[np.ndarray, "fine l"], k: int, *, prior_weight: float = 0.0) -> Merging:
    """Merge greedily, the cheapest pair first, then move single tokens to groups that suit them better.

    Ties go to the lower tokens. Time about merges × fine · L, so seconds for 2,000 tokens of 100 classes.

    Parameters
    ----------
    counts
        R: patches of each fine token in each class; rows of zeros are tokens that were not seen.
    k
        Groups wanted, at least 2.
    prior_weight
        κ ≥ 0: each token's class shares are drawn to p as by κ patches of the prior: u_i is scaled by r_i / (r_i + κ).
        So tokens of few patches do not look like perfect ones.

    Raises
    ------
    InputError
        k < 2, or fewer tokens with a patch than k; a table without two classes.
    """
    size = counts.sum(axis=1)
    seen = np.flatnonzero(size > 0)
    counts = counts[seen][:, counts.sum(axis=0) > 0]
    if k < 2:
        raise InputError(f"A vocabulary of k = {k} tells no patches apart; choose k of at least 2.")
    if counts.shape[1] < 2:
        raise InputError("Tokens can be aligned with two classes or more; these counts hold fewer.")
    if len(seen) < k:
        raise InputError(
            f"Only {len(seen)} fine tokens occur in the images that are aligned with, fewer than k = {k}: "
            "align with more images, or choose a smaller k."
        )
    weight = size[seen] / size.sum()
    prior = counts.sum(axis=0) / counts.sum()
    shrink = size[seen] / (size[seen] + prior_weight)
    profile = shrink[:, None] * (counts / size[seen][:, None] - prior) / np.sqrt(prior)
    groups = _relocate(_agglomerate(profile, weight, k), profile, weight, k)
    mass = np.bincount(groups, weights=size[seen], minlength=k)
    rank = np.empty(k, dtype=np.int64)
    rank[np.argsort(-mass, kind="stable")] = np.arange(k)
    all_groups = np.full(len(size), -1, dtype=np.int64)
    all_groups[seen] = rank[groups]
    return Merging(
        groups=all_groups,
        fine=_alignment(_scatter(profile, weight)),
        kept=_alignment(_scatter(*_centres(groups, profile, weight, k))),
    )


def choose_prior_weight(tables: Float64[np.ndarray, "folds fine l"]) -> float:
    """The κ with which the class shares of one fold of images are best foretold from the others.

    The error is Σ_i r_i ‖T̂_i − T_i‖² in the metric 1/p, T̂ from the other folds, drawn to p by κ; it is quadratic in the
    factor r / (r + κ), so all κ are tried at once. Folds are of images, so patches that resemble each other because
    they share an image do not pass for many.

    Parameters
    ----------
    tables
        R of each fold, two folds or more.
    """
    total = tables.sum(axis=0)
    prior = total.sum(axis=0) / total.sum()
    known = prior > 0
    root = np.sqrt(prior[known])
    error = np.zeros(len(PRIOR_WEIGHTS))
    for own in tables:
        others = total - own
        mine, theirs = own.sum(axis=1), others.sum(axis=1)
        both = (mine > 0) & (theirs > 0)
        shares, learned = (
            (table[both][:, known] / size[both, None] - prior[known]) / root
            for table, size in ((own, mine), (others, theirs))
        )
        factor = theirs[both] / (theirs[both] + PRIOR_WEIGHTS[:, None])
        error += factor**2 @ (mine[both] * (learned**2).sum(axis=1))
        error -= 2 * factor @ (mine[both] * (learned * shares).sum(axis=1))
    return float(PRIOR_WEIGHTS[np.argmin(error)])


class _Costs:
    """Δ(i, ·) · (L − 1) of one row at a time, under the metric as it stands."""

    def __init__(self, profile: Float64[np.ndarray, "m l"], weight: Float64[np.ndarray, " m"]) -> None:
        self.profile, self.weight = profile.copy(), weight.copy()
        # I − S but for √p√pᵀ, which no profile meets, as √pᵀu = 0.
        self.metric = np.eye(profile.shape[1]) - _scatter(profile, weight)
        self.alive = np.ones(len(weight), dtype=bool)
        self.refresh()

    def refresh(self) -> None:
        """Make the products with the metric anew, without the rounding of the updates."""
        self.bent = self.profile @ self.metric
        self.bent_length = (self.bent * self.profile).sum(axis=1)
        self.length = (self.profile**2).sum(axis=1)

    def row(self, i: int) -> Float64[np.ndarray, " m"]:
        """Cost of merging i with each other token; infinite for itself and for those that are gone."""
        joint = self.weight[i] * self.weight / (self.weight[i] + self.weight)
        bent = joint * (self.bent_length[i] + self.bent_length - 2 * (self.profile @ self.bent[i]))
        plain = joint * (self.length[i] + self.length - 2 * (self.profile @ self.profile[i]))
        cost = 2 * np.maximum(bent, 0.0) + plain**2
        cost[~self.alive] = np.inf
        cost[i] = np.inf
        return np.asarray(cost)

    def merge(self, kept: int, gone: int) -> None:
        """Put `gone` into `kept`."""
        a, b = self.weight[kept], self.weight[gone]
        step = np.sqrt(a * b / (a + b)) * (self.profile[kept] - self.profile[gone])
        self.metric += np.outer(step, step)
        along = self.profile @ step
        self.bent += np.outer(along, step)
        self.bent_length += along**2
        self.profile[kept] = (a * self.profile[kept] + b * self.profile[gone]) / (a + b)
        self.weight[kept] = a + b
        self.alive[gone] = False
        self.bent[kept] = self.profile[kept] @ self.metric
        self.bent_length[kept] = self.bent[kept] @ self.profile[kept]
        self.length[kept] = self.profile[kept] @ self.profile[kept]


def _agglomerate(
    profile: Float64[np.ndarray, "m l"], weight: Float64[np.ndarray, " m"], k: int
) -> Int64[np.ndarray, " m"]:
    """Group of each token after m − k merges, each the cheapest there is."""
    costs = _Costs(profile, weight)
    owner = np.arange(len(weight))
    bound = np.array([costs.row(i).min() for i in range(len(weight))]) if len(weight) > k else np.empty(0)
    left = len(weight)
    while left > k:
        i = int(bound.argmin())
        row = costs.row(i)
        bound[i] = row.min()
        if int(bound.argmin()) != i:
            continue
        j = int(row.argmin())
        kept, gone = min(i, j), max(i, j)
        costs.merge(kept, gone)
        owner[owner == gone] = kept
        left -= 1
        if left % 256 == 0:
            costs.refresh()
        bound[gone] = np.inf
        row = costs.row(kept)
        bound = np.minimum(bound, row)
        bound[gone], bound[kept] = np.inf, row.min()
    return np.unique(owner, return_inverse=True)[1].astype(np.int64)


def _relocate(
    groups: Int64[np.ndarray, " m"], profile: Float64[np.ndarray, "m l"], weight: Float64[np.ndarray, " m"], k: int
) -> Int64[np.ndarray, " m"]:
    """Lloyd passes in the metric of the groups as they stand, as long as alignment rises and no group runs empty."""
    centres, mass = _centres(groups, profile, weight, k)
    value = _alignment(_scatter(centres, mass))
    for _ in range(_LLOYD_PASSES):
        metric = np.eye(profile.shape[1]) - _scatter(centres, mass)
        bent = centres @ metric
        moved = ((bent * centres).sum(axis=1) - 2 * profile @ bent.T).argmin(axis=1)
        if len(np.unique(moved)) < k:
            break
        new_centres, new_mass = _centres(moved, profile, weight, k)
        new_value = _alignment(_scatter(new_centres, new_mass))
        if new_value <= value + _GAIN:
            break
        groups, centres, mass, value = moved.astype(np.int64), new_centres, new_mass, new_value
    return groups


def _centres(
    groups: Int64[np.ndarray, " m"], profile: Float64[np.ndarray, "m l"], weight: Float64[np.ndarray, " m"], k: int
) -> tuple[Float64[np.ndarray, "k l"], Float64[np.ndarray, " k"]]:
    mass = np.bincount(groups, weights=weight, minlength=k)
    sums = np.zeros((k, profile.shape[1]))
    np.add.at(sums, groups, weight[:, None] * profile)
    return sums / mass[:, None], mass


def _scatter(profile: Float64[np.ndarray, "m l"], weight: Float64[np.ndarray, " m"]) -> Float64[np.ndarray, "l l"]:
    """S − √p√pᵀ = Σ_i w_i u_i u_iᵀ."""
    return np.asarray((profile * weight[:, None]).T @ profile)


def _alignment(scatter: Float64[np.ndarray, "l l"]) -> float:
    """1 − ‖I − S‖² / (L − 1) with S = √p√pᵀ + scatter, the norm multiplied out, since scatter·√p = 0."""
    return float((2 * np.trace(scatter) - (scatter**2).sum()) / (len(scatter) - 1))
