"""The figures of merit, each from the class matrices of `TokenSums`, for many weightings at once.

Formulas: docs/theory.md and the docstring of `scoring.tcas`. Everything is float64.
"""

import numpy as np
from jaxtyping import Float64
from scipy.special import xlogy

from clustermim.scoring.sums import TokenSums

PLUG_IN = ("alignment", "labelling_error", "tcas", "tcas_rows", "tcas_cosine")
"""Figures of a class matrix; each has a cross-fitted twin."""
CROSSFIT = tuple(f"{name}_crossfit" for name in PLUG_IN)
COMPANIONS = ("nmi", "purity", "entropy", "perplexity", "used_tokens")
FIGURES = (*PLUG_IN, *CROSSFIT, *COMPANIONS)

HIGHER_IS_BETTER = frozenset({"alignment", "alignment_crossfit", "nmi", "purity", "perplexity", "used_tokens"})

# The range a figure can take; intervals are cut to it. Cross-fitted alignment may fall a little below 0.
BOUNDS: dict[str, tuple[float, float]] = {
    "alignment": (0.0, 1.0),
    "alignment_crossfit": (-np.inf, 1.0),
    "labelling_error": (0.0, 1.0),
    "labelling_error_crossfit": (0.0, 1.0),
    "nmi": (0.0, 1.0),
    "purity": (0.0, 1.0),
}


ROUNDING = 1e-13


def class_walk(sums: TokenSums) -> Float64[np.ndarray, "b l l"]:
    """C = Q·T, the two-step walk class → token → class; rows sum to 1."""
    return np.asarray(sums.joined / sums.class_sizes[:, :, None])


def class_cosine(gram: Float64[np.ndarray, "b l l"]) -> Float64[np.ndarray, "b l l"]:
    """G_cc' / √(G_cc G_c'c'), at most 1; 1 too where G_cc = 0, a class that nothing tells from the others."""
    lengths = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    both = lengths[:, :, None] * lengths[:, None, :]
    cosine = np.divide(gram, both, out=np.ones_like(gram), where=both > 0)
    classes = np.arange(gram.shape[1])
    cosine[:, classes, classes] = 1.0
    return np.asarray(np.minimum(cosine, 1.0))


def alignment_of(walk: Float64[np.ndarray, "b l l"], prior: Float64[np.ndarray, "b l"]) -> Float64[np.ndarray, " b"]:
    """1 − ‖I − S‖²_F / (L − 1) with S = D_p^½ C D_p^−½; `prior` is p."""
    root = np.sqrt(prior)
    adjacency = walk * root[:, :, None] / root[:, None, :]
    value = 1.0 - distance_to_identity(adjacency) / (prior.shape[1] - 1)
    # Rounding leaves ±2e-16 where the exact value is 0.
    return np.where(np.abs(value) < ROUNDING, 0.0, np.minimum(value, 1.0))


def error_of(walk: Float64[np.ndarray, "b l l"], prior: Float64[np.ndarray, "b l"]) -> Float64[np.ndarray, " b"]:
    """α = 1 − Σ_c p_c C_cc: the chance that two patches drawn through a common token differ in class."""
    value = 1.0 - (prior * np.diagonal(walk, axis1=1, axis2=2)).sum(axis=1)
    return np.where(value < ROUNDING, 0.0, value)


def distance_to_identity(matrix: Float64[np.ndarray, "b l l"]) -> Float64[np.ndarray, " b"]:
    """‖C − I‖²_F."""
    return np.asarray(((matrix - np.eye(matrix.shape[1])) ** 2).sum(axis=(1, 2)))


def figures(sums: TokenSums) -> dict[str, Float64[np.ndarray, " b"]]:
    """Every figure that the sums allow, by name; cross-fitted ones only where the counts have folds.

    A weighting that leaves some class without a patch has no class matrix: its figures are NaN.
    """
    sizes, prior = sums.class_sizes, sums.prior
    squared = sizes.shape[1] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        walk = class_walk(sums)
        out = _matrix_figures(walk, sums.rows, class_cosine(sums.gram), prior, squared, "")
        out["alignment"] = np.maximum(out["alignment"], 0.0)
        if sums.cross is not None and sums.cross_rows is not None and sums.cross_gram is not None:
            cosine = class_cosine(sums.cross_gram)
            out |= _matrix_figures(sums.cross, sums.cross_rows, cosine, prior, squared, "_crossfit")
        out |= _companions(sums)
    lost = (sizes <= 0).any(axis=1)
    if lost.any():
        out = {name: np.where(lost, np.nan, value) for name, value in out.items()}
    return out


def _matrix_figures(
    walk: np.ndarray, rows: np.ndarray, cosine: np.ndarray, prior: np.ndarray, squared: int, suffix: str
) -> dict[str, np.ndarray]:
    return {
        f"alignment{suffix}": alignment_of(walk, prior),
        f"labelling_error{suffix}": error_of(walk, prior),
        f"tcas{suffix}": distance_to_identity(walk) / squared,
        f"tcas_rows{suffix}": distance_to_identity(rows) / squared,
        f"tcas_cosine{suffix}": distance_to_identity(cosine) / squared,
    }


def _companions(sums: TokenSums) -> dict[str, np.ndarray]:
    total = sums.class_sizes.sum(axis=1)
    log_total = np.log(total)
    token_entropy = np.maximum(0.0, log_total - sums.token_log / total)
    joint_entropy = log_total - sums.cell_log / total
    class_entropy = -xlogy(sums.prior, sums.prior).sum(axis=1)
    mutual = np.maximum(0.0, token_entropy + class_entropy - joint_entropy)
    return {
        "nmi": 2 * mutual / (token_entropy + class_entropy),
        "purity": sums.majority / total,
        "entropy": np.maximum(0.0, joint_entropy - token_entropy),
        "perplexity": np.exp(token_entropy),
        "used_tokens": sums.used,
    }
