"""The augmentation graph of masked image modelling, and what tokens do to it.

A visible view x1 and a hidden view x2 (one hidden patch) of the same image are joined with weight w(x1, x2). A
tokenizer merges the x2 of equal token into one node. With W the weights, D1 and D2 its row and column sums,
B = D1^−½ W D2^−½ and A = B Bᵀ: the graph between visible views that share hidden ones. Its eigenvalues λ are the
squared singular values of B (HaoChen, Wei, Gaidon, Ma, "Provable guarantees for self-supervised deep learning with
spectral contrastive loss", NeurIPS 2021; Du, Wang, Wang, ICLR 2024). docs/theory.md derives what is used here.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import svds
from torch import Tensor

from clustermim.errors import InputError, nearest
from clustermim.scoring.folds import ArrayLike, checked_integers

# Up to this many nodes on the smaller side all eigenvalues are computed.
EXACT_SIDE = 2000
LARGEST = 100

Weights: TypeAlias = "Tensor | np.ndarray | sparse.spmatrix | sparse.sparray"
ToyTokens = Literal["identity", "class-wise", "cross-class"]


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """Spectrum and labels of an augmentation graph."""

    eigenvalues: Float64[np.ndarray, " k"] = field(repr=False)
    """λ, descending, in [0, 1]; the first is 1. All of them, or the k largest."""
    sum_squared: float
    """Σλ² over all eigenvalues, whether listed or not."""
    spectral_gap: float
    """1 − λ₂."""
    components: int
    """Connected parts of the graph: how often the eigenvalue 1 occurs."""
    labelling_error: float | None
    """α: chance that two visible views drawn through a common hidden node differ in class. None without labels."""
    intra_class: float | None
    """Mean entry of A between distinct views of one class. None without labels or such pairs."""
    inter_class: float | None
    """Mean entry of A between views of two classes. None without labels or such pairs."""
    visible: int
    """Visible views."""
    hidden: int
    """Hidden nodes of positive weight, after merging."""

    def bound(self, c1: float = 1.0, c2: float | None = None) -> float | None:
        """c1·Σλ² + c2·α, the quantity that bounds downstream error up to constants; None without labels.

        Parameters
        ----------
        c1
            Weight of Σλ².
        c2
            Weight of α. Default: 2·c1.
        """
        if self.labelling_error is None:
            return None
        return c1 * self.sum_squared + (2 * c1 if c2 is None else c2) * self.labelling_error

    def to_dict(self) -> dict[str, Any]:
        """Every figure but the spectrum, as a flat record."""
        second = float(self.eigenvalues[1]) if len(self.eigenvalues) > 1 else 0.0
        return {
            "second_eigenvalue": second,
            "sum_squared": self.sum_squared,
            "spectral_gap": self.spectral_gap,
            "components": self.components,
            "labelling_error": self.labelling_error,
            "intra_class": self.intra_class,
            "inter_class": self.inter_class,
            "bound": self.bound(),
            "visible": self.visible,
            "hidden": self.hidden,
        }


def augmentation_spectrum(
    weights: Weights,
    tokens: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    k: int | None = None,
) -> GraphReport:
    """Spectrum, labelling error and class connectivity of the graph between visible views.

    Parameters
    ----------
    weights
        w ≥ 0 between visible and hidden views, (n1, n2), dense or scipy-sparse; their scale does not matter.
    tokens
        Token of each hidden view, integers from 0, (n2,); hidden views of one token become one node. None: no merging.
    labels
        Class of each visible view, integers from 0, (n1,), or class memberships ≥ 0, (n1, L), scaled here to sum to 1.
    k
        How many of the largest eigenvalues to give. Default: all up to 2,000 nodes on the smaller side, else 100.

    Raises
    ------
    InputError
        Weights that are NaN, infinite or negative, a visible view without weight, lengths that do not match, k < 2.
    """
    matrix = _checked_weights(weights)
    if k is not None and k < 2:
        raise InputError(f"k must be at least 2, so that there is a spectral gap; got {k}.")
    if tokens is not None:
        matrix = _merged(matrix, tokens)
    members = None if labels is None else _memberships(labels, matrix.shape[0])
    matrix = matrix[:, np.asarray(matrix.sum(axis=0)).ravel() > 0]
    rows, columns = (np.asarray(matrix.sum(axis=axis)).ravel() for axis in (1, 0))
    scaled = sparse.csr_matrix(sparse.diags_array(rows**-0.5) @ matrix @ sparse.diags_array(columns**-0.5))
    parts = _components(matrix)
    eigenvalues, squares = _spectrum(scaled, parts, k)
    error = intra = inter = None
    if members is not None:
        error = _labelling_error(matrix, columns, members)
        intra, inter = _class_edges(scaled, members)
    return GraphReport(
        eigenvalues=eigenvalues,
        sum_squared=squares,
        spectral_gap=1.0 - float(eigenvalues[1]) if len(eigenvalues) > 1 else 1.0,
        components=int(parts.max()) + 1,
        labelling_error=error,
        intra_class=intra,
        inter_class=inter,
        visible=matrix.shape[0],
        hidden=matrix.shape[1],
    )


def toy_model(
    views: int, shared: int, tokens: ToyTokens = "identity"
) -> tuple[Float64[np.ndarray, "n1 n2"], Int64[np.ndarray, " n2"], Float64[np.ndarray, "n1 2"]]:
    """Two classes that share views: weights, tokens and class memberships for `augmentation_spectrum`.

    Each class has n visible and n hidden views, m of either are shared with the other class, and a pair is drawn by
    drawing a class and then a visible and a hidden view of it, uniformly and independently. λ₂ is (1 − m/n)² with
    `identity` tokens, (1 − m/n)³ with `class-wise` ones (a token a class, the shared hidden views split evenly) and 0
    with `cross-class` ones (each of the two tokens holds half of either class).

    Parameters
    ----------
    views
        n, even.
    shared
        m, even, at most n.
    tokens
        Which of the three tokenizers.

    Raises
    ------
    InputError
        Odd numbers, m > n, or an unknown tokenizer.
    """
    n, m = views, shared
    if n < 2 or n % 2 or m < 0 or m % 2 or m > n:
        raise InputError(f"The toy model needs an even n ≥ 2 and an even m with 0 ≤ m ≤ n; got n = {n}, m = {m}.")
    own = n - m
    # Views in the order: only class 0, shared, only class 1.
    member = np.zeros((2, 2 * n - m))
    member[0, :n] = member[1, own:] = 1.0 / n
    weights = 0.5 * member.T @ member
    if tokens == "identity":
        merged = np.arange(2 * n - m)
    elif tokens == "class-wise":
        merged = np.repeat([0, 0, 1, 1], [own, m // 2, m // 2, own])
    elif tokens == "cross-class":
        merged = np.repeat([0, 1, 0, 1, 0, 1], [own // 2, own // 2, m // 2, m // 2, own // 2, own // 2])
    else:
        raise InputError(f"There are no {tokens!r} tokens.{nearest(tokens, ('identity', 'class-wise', 'cross-class'))}")
    return weights, merged.astype(np.int64), (member / member.sum(axis=0)).T


def mask_graph(hidden: np.ndarray, index: np.ndarray, images: int) -> sparse.csr_matrix:
    """Weights of a mask graph of real images: every mask of an image is a visible view, every patch a hidden view.

    Parameters
    ----------
    hidden
        Masks, bool (views, N), True = hidden; one row a visible view.
    index
        Image of each row, (views,).
    images
        Number of images.

    Returns
    -------
    scipy.sparse.csr_matrix
        (views, images·N): 1/(hidden patches of the view) where the patch is hidden in the view. Column image·N + patch.
    """
    row, patch = np.nonzero(hidden)
    values = 1.0 / hidden.sum(axis=1)[row]
    shape = (len(hidden), images * hidden.shape[1])
    return sparse.csr_matrix((values, (row, index[row] * hidden.shape[1] + patch)), shape=shape)


def _checked_weights(weights: Weights) -> sparse.csr_matrix:
    if isinstance(weights, Tensor):
        weights = weights.detach().cpu().numpy()
    if len(weights.shape) != 2 or 0 in weights.shape:
        raise InputError(f"weights must have shape (visible views, hidden views); got {tuple(weights.shape)}.")
    matrix = sparse.csr_matrix(weights, dtype=np.float64, copy=True)
    matrix.sum_duplicates()
    if not np.isfinite(matrix.data).all():
        raise InputError("weights holds NaN or infinite values; every weight must be a number ≥ 0.")
    if (matrix.data < 0).any():
        raise InputError(f"weights holds negative values (lowest {matrix.data.min():g}); every weight must be ≥ 0.")
    matrix.eliminate_zeros()
    empty = np.flatnonzero(np.diff(matrix.indptr) == 0)
    if len(empty):
        raise InputError(
            f"{len(empty)} of {matrix.shape[0]} visible views have no weight to any hidden view (first: view "
            f"{empty[0]}): leave them out."
        )
    return matrix


def _merged(matrix: sparse.csr_matrix, tokens: ArrayLike) -> sparse.csr_matrix:
    ids = checked_integers(tokens, "tokens")
    if ids.shape != (matrix.shape[1],):
        raise InputError(f"tokens must have one entry per hidden view, {matrix.shape[1]}; got shape {ids.shape}.")
    if ids.min() < 0:
        raise InputError(f"tokens holds negative values (lowest {ids.min()}); tokens are numbered from 0.")
    used, column = np.unique(ids, return_inverse=True)
    gather = sparse.csr_matrix((np.ones(len(ids)), (np.arange(len(ids)), column)), shape=(len(ids), len(used)))
    return sparse.csr_matrix(matrix @ gather)


def _memberships(labels: ArrayLike, views: int) -> sparse.csr_matrix:
    given = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if given.ndim not in (1, 2) or len(given) != views:
        raise InputError(
            f"labels must have one entry, or one row of class memberships, per visible view ({views}); got shape "
            f"{given.shape}."
        )
    if given.ndim == 1:
        classes = checked_integers(given, "labels")
        if classes.min() < 0:
            raise InputError(f"labels holds negative values (lowest {classes.min()}); classes are numbered from 0.")
        return sparse.csr_matrix((np.ones(views), (np.arange(views), classes)))
    if given.dtype.kind not in "fiub" or not np.isfinite(given).all() or (given < 0).any():
        raise InputError("labels (class memberships) must be finite numbers ≥ 0, without NaN.")
    total = given.sum(axis=1)
    if (total <= 0).any():
        raise InputError(
            f"Visible view {int(np.argmax(total <= 0))} belongs to no class: every row needs a membership."
        )
    return sparse.csr_matrix(given / total[:, None])


def _spectrum(scaled: sparse.csr_matrix, parts: Int64[np.ndarray, " n"], k: int | None) -> tuple[np.ndarray, float]:
    """The largest eigenvalues of A, and Σλ² = ‖A‖²_F over all.

    The spectrum of a graph is that of its connected parts together. Taking them one by one is not only cheaper: an
    iteration over the whole would be lost among the many eigenvalues 1, one a part.
    """
    rows, columns = scaled.shape
    order = [np.argsort(side, kind="stable") for side in (parts[:rows], parts[rows:])]
    number = int(parts.max()) + 1
    cuts = [
        np.searchsorted(side[o], np.arange(number + 1))
        for side, o in zip((parts[:rows], parts[rows:]), order, strict=True)
    ]
    blocks = scaled[order[0]][:, order[1]]
    values, squares = [], 0.0
    for part in range(number):
        block = blocks[cuts[0][part] : cuts[0][part + 1], cuts[1][part] : cuts[1][part + 1]]
        some, square = _part_spectrum(block, k)
        values.append(some)
        squares += square
    wanted = k if k is not None else (None if min(rows, columns) <= EXACT_SIDE else LARGEST)
    return np.clip(np.sort(np.concatenate(values))[::-1][:wanted], 0.0, 1.0), squares


def _part_spectrum(scaled: sparse.csr_matrix, k: int | None) -> tuple[np.ndarray, float]:
    small = min(scaled.shape)
    # A = BBᵀ and BᵀB share their non-zero eigenvalues; the smaller one is made.
    gram = (scaled @ scaled.T if scaled.shape[0] <= scaled.shape[1] else scaled.T @ scaled).tocsr()
    squares = float((gram.data**2).sum())
    if small <= EXACT_SIDE:
        return np.linalg.eigvalsh(gram.toarray()), squares
    # A fixed start makes the iteration repeatable.
    start = np.random.default_rng(0).random(small)
    found = svds(scaled, k=min(k or LARGEST, small - 1), v0=start, return_singular_vectors=False)
    return found**2, squares


def _labelling_error(matrix: sparse.csr_matrix, columns: np.ndarray, members: sparse.csr_matrix) -> float:
    # R[S, c] = Σ_x1 w(x1, S) y_c(x1): the token-class counts of this graph, so α is the same sum as in `figures`.
    joint = (matrix.T @ members).tocsr()
    kept = np.asarray(joint.multiply(joint).sum(axis=1)).ravel() / columns
    return float(np.clip(1.0 - kept.sum() / columns.sum(), 0.0, 1.0))


def _class_edges(scaled: sparse.csr_matrix, members: sparse.csr_matrix) -> tuple[float | None, float | None]:
    """Mean edge within and between classes, from ‖Bᵀy_c‖², without making the n1 × n1 matrix A."""
    views = scaled.shape[0]
    loops = np.asarray(scaled.multiply(scaled).sum(axis=1)).ravel()
    own = np.asarray(members.multiply(members).sum(axis=1)).ravel()
    reached = (scaled.T @ members).tocsr()
    within = float((reached.data**2).sum() - (loops * own).sum())
    within_pairs = float((np.asarray(members.sum(axis=0)) ** 2).sum() - own.sum())
    total = float((np.asarray(scaled.sum(axis=0)) ** 2).sum() - loops.sum())
    # With memberships, a pair is one of one class to the degree Σ_c y_c y'_c; the loops take 1 − Σ_c y_c² with them.
    between_pairs = views * (views - 1) - within_pairs
    intra = within / within_pairs if within_pairs > 1e-12 else None
    inter = (total - within) / between_pairs if between_pairs > 1e-12 else None
    return intra, inter


def _components(matrix: sparse.csr_matrix) -> Int64[np.ndarray, " n"]:
    """Connected part of each node: visible views, then hidden ones."""
    both = sparse.block_array([[None, matrix], [matrix.T, None]])
    return np.asarray(connected_components(both, directed=False)[1], dtype=np.int64)
