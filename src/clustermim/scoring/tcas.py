"""Token-class alignment: what a score is, and how to get one from token ids and labels.

R[i, c] counts patches with token i in images of class c; n_c, r_i are its sums over tokens and over classes, p_c is
the share of patches in class c; Q[c, i] = R[i, c]/n_c = p(token | class); T[i, c] = R[i, c]/r_i = p(class | token).

- `alignment`, the number to lead with, higher is better: 1 − ‖I − S‖²_F/(L−1) with S = D_p^½ C D_p^−½, C = Q·T.
  0: tokens independent of class. 1: every token belongs to one class.
- `labelling_error` α = 1 − Σ_c p_c C_cc: two patches drawn through a common token differ in class.
- TCAS = ‖C − I‖²_F / L², lower is better (Du, Wang, Wang, "On the Role of Discrete Tokenization in Visual
  Representation Learning", ICLR 2024). Its class matrix C is read in three ways: `tcas` (walk, C = Q·T), `tcas_rows`
  (C = Tᵀ·T; grows with K) and `tcas_cosine` (cosine similarity of the classes' token histograms).

Plug-in figures flatter large vocabularies. Cross-fitted twins (`_crossfit`) take Q from one fold of images and T from
the others and average C over the folds before the norm is taken. A token that the other folds never saw is given the
class prior p, where p is the share of patches per class over all folds: the very p in S. Hence tokens that never
recur between images score an alignment of exactly 0, in every bootstrap replicate too, and tokens that name the class
score exactly 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.special import xlogy

from clustermim.errors import InputError
from clustermim.scoring.counts import RowCounts, TokenCounts
from clustermim.scoring.figures import FIGURES, class_walk, figures
from clustermim.scoring.folds import ArrayLike, ImagePlan, checked_integers, plan_images
from clustermim.scoring.intervals import Replicates, basic_intervals, bootstrap_figures
from clustermim.scoring.sums import TokenSummer


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """The score of one tokenizer on one set of labelled images.

    With a bootstrap, each figure also has `<figure>_low` and `<figure>_high`, the ends of its 95 % interval; without
    one they are None. The interval aims at the value for endless images, so a plug-in figure can lie outside its own
    interval: that is the measure of its flattery. Cross-fitted figures are None where nothing could be cross-fitted
    (see `notes`).
    """

    alignment: float
    """Plug-in alignment, in [0, 1]; higher is better."""
    labelling_error: float
    """Plug-in α, in [0, 1]; lower is better."""
    tcas: float
    """Plug-in TCAS, reading `walk`; lower is better."""
    tcas_rows: float
    """Plug-in TCAS, reading `rows`; lower is better; grows with the vocabulary."""
    tcas_cosine: float
    """Plug-in TCAS, reading `cosine`; lower is better."""
    alignment_crossfit: float | None
    labelling_error_crossfit: float | None
    tcas_crossfit: float | None
    tcas_rows_crossfit: float | None
    tcas_cosine_crossfit: float | None
    nmi: float
    """Mutual information of token and class over the mean of their entropies, in [0, 1]; plug-in."""
    purity: float
    """Share of patches whose class is the commonest of their token; plug-in."""
    entropy: float
    """Mean entropy of p(class | token) over patches, in nats; plug-in."""
    perplexity: float
    """exp of the entropy of the token marginal: how many tokens are in even use."""
    used_tokens: int
    """Tokens that occur."""
    vocab_size: int
    num_classes: int
    """L: classes that occur."""
    images: int
    patches: int
    """Patches counted."""
    folds: int
    """0: plug-in only."""
    bootstrap: int
    seed: int
    seconds_tokenizing: float | None = None
    """Time the tokenizer took, where the score was made from images."""
    seconds_counting: float | None = None
    """Time that counting its tokens added."""
    notes: tuple[str, ...] = ()
    """What the reader must be told."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict, repr=False)
    replicates: Replicates | None = field(default=None, repr=False, compare=False)
    """Each figure in each bootstrap replicate; what `compare` pairs."""
    plan: ImagePlan = field(repr=False, compare=False)
    """The images, folds and resampling units scored on."""
    classes: np.ndarray = field(repr=False, compare=False)
    """Label value of each class, (L,)."""
    prior: np.ndarray = field(repr=False, compare=False)
    """p_c, (L,)."""
    walk: np.ndarray = field(repr=False, compare=False)
    """C = Q·T, plug-in, (L, L): row c says where the tokens of class c lead."""
    walk_crossfit: np.ndarray | None = field(repr=False, compare=False)
    """C averaged over folds, (L, L)."""
    tokens: np.ndarray = field(repr=False, compare=False)
    """Ids of the used tokens."""
    token_classes: sparse.csr_matrix = field(repr=False, compare=False)
    """R of the used tokens, (used, L)."""

    def __getattr__(self, name: str) -> float | None:
        """`<figure>_low` and `<figure>_high`."""
        figure, _, end = name.rpartition("_")
        if end in ("low", "high") and figure in FIGURES:
            interval = self.intervals.get(figure)
            return None if interval is None else interval[end == "high"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Every figure, its interval and what it was measured on: a flat record that JSON can hold."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.repr and f.name != "notes"}
        for name, (low, high) in self.intervals.items():
            plain[f"{name}_low"], plain[f"{name}_high"] = low, high
        return plain | {"notes": list(self.notes)}

    def token_rows(self, limit: int | None = 20) -> list[dict[str, Any]]:
        """The used tokens, those that add most to the labelling error first.

        α is a mean over patches of 1 − Σ_c T[i, c]² of the patch's token: `error` is that term, `error_share` the part
        of α that the token's patches make up.

        Parameters
        ----------
        limit
            How many rows; None for all.
        """
        counts = self.token_classes
        size = np.asarray(counts.sum(axis=1)).ravel()
        squares = np.asarray(counts.multiply(counts).sum(axis=1)).ravel()
        error = 1 - squares / size**2
        part = error * size / size.sum()
        worst = np.argsort(-part, kind="stable")[:limit]
        total = part.sum()
        rows = []
        for i in worst:
            shares = np.sort(counts[[i]].toarray()[0] / size[i])
            order = np.argsort(-counts[[i]].toarray()[0], kind="stable")
            rows.append(
                {
                    "token": int(self.tokens[i]),
                    "patches": int(size[i]),
                    "share": float(size[i] / size.sum()),
                    "class": int(self.classes[order[0]]),
                    "class_share": float(shares[-1]),
                    "second_class": int(self.classes[order[1]]),
                    "second_share": float(shares[-2]),
                    "entropy": float(-xlogy(shares, shares).sum()) + 0.0,
                    "error": float(error[i]),
                    "error_share": float(part[i] / total) if total > 0 else 0.0,
                }
            )
        return rows

    def class_rows(self) -> list[dict[str, Any]]:
        """The classes, worst first: how often the tokens of a class lead back to it, and where else they lead.

        `stays` is C_cc of the cross-fitted walk (plug-in where there is none); `confused_with` is the other class that
        the walk reaches most often beyond that class's share p, and `lift` is how many times more often.
        """
        walk = self.walk if self.walk_crossfit is None else self.walk_crossfit
        lift = walk / self.prior
        away = np.where(np.eye(len(walk), dtype=bool), -np.inf, lift)
        rows = []
        for c in np.argsort(np.diagonal(lift), kind="stable"):
            other = int(away[c].argmax())
            rows.append(
                {
                    "class": int(self.classes[c]),
                    "share": float(self.prior[c]),
                    "stays": float(walk[c, c]),
                    "stays_lift": float(lift[c, c]),
                    "confused_with": int(self.classes[other]),
                    "confusion": float(walk[c, other]),
                    "lift": float(lift[c, other]),
                }
            )
        return rows


def score_tokens(
    ids: ArrayLike,
    labels: ArrayLike,
    vocab_size: int | None = None,
    num_classes: int | None = None,
    crossfit: bool = True,
    bootstrap: int = 0,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> TokenScore:
    """Score token ids against image labels; no tokenizer, no images, no training.

    Parameters
    ----------
    ids
        Token of each patch, integers in [0, vocab_size), shape (images, N).
    labels
        Class of each image, integers from 0, shape (images,). Or of each patch (dense labels), (images, N), −1 where it
        is to be ignored: see `scoring.dense`. Or several of each image, bool (images, L): each patch counts in each.
    vocab_size
        K. Default: the largest id plus one.
    num_classes
        Number of classes the labels come from. Classes without an image are left out and noted.
    crossfit
        Also give the cross-fitted figures: min(5, images of the smallest class) folds.
    bootstrap
        Number of bootstrap replicates for 95 % intervals; 0 for none. A thousand is plenty.
    seed
        Seed of folds and resamples.
    groups
        One value per image (patient, slide, video): equal values stay in one fold and are resampled together.

    Raises
    ------
    InputError
        Ids outside [0, vocab_size), labels that are negative, of one class only, or of another number than images; NaN.
    """
    check_options(bootstrap, seed)
    array = checked_integers(ids, "ids")
    if array.ndim != 2 or array.shape[1] == 0:
        raise InputError(f"ids must have shape (images, patches); got shape {tuple(array.shape)}.")
    plan = plan_images(labels, num_classes=num_classes, groups=groups, crossfit=crossfit, seed=seed)
    if plan.num_images != len(array):
        raise InputError(f"ids has {len(array)} images but labels has {plan.num_images}: give one label per image.")
    counts = TokenCounts(plan, int(array.max()) + 1 if vocab_size is None else vocab_size, per_image=bootstrap > 0)
    step = max(1, (1 << 20) // array.shape[1])
    for start in range(0, len(array), step):
        part = torch.from_numpy(array[start : start + step])
        counts.update(part, None, torch.arange(start, start + len(part)))
    return score_counts(counts, bootstrap=bootstrap, seed=seed)


def score_counts(counts: TokenCounts, *, bootstrap: int = 0, seed: int = 0) -> TokenScore:
    """Score what has been counted.

    Parameters
    ----------
    counts
        Counts of every image of its plan; made with `per_image=True` if a bootstrap is wanted.
    bootstrap
        Number of replicates; 0 for none.
    seed
        Seed of the resamples.
    """
    check_options(bootstrap, seed)
    plan, rows = counts.plan, counts.rows()
    cells = rows.by_cell()
    values, matrices = _estimate(cells)
    intervals: dict[str, tuple[float, float]] = {}
    replicates = None
    notes = list(plan.notes)
    if bootstrap:
        if not counts.per_image:
            raise InputError("A bootstrap needs the counts of each image: make TokenCounts with per_image=True.")
        replicates = bootstrap_figures(rows, plan, bootstrap, seed)
        if (np.unique(plan.strata, return_counts=True)[1] < 2).any():
            notes.append(
                "Some class has a single image (or group) in a fold, whose spread is unknown: the intervals take it to "
                "vary as the others do."
            )
        intervals = basic_intervals(values, replicates, vocab_size=counts.vocab_size)
        lost = int(np.isnan(replicates.full["alignment"]).sum())
        if lost:
            notes.append(f"{lost} of {bootstrap} resamples lost a whole class and are left out of the intervals.")
    known: dict[str, Any] = {name: values.get(name) for name in FIGURES}
    known["used_tokens"] = round(values["used_tokens"])
    return TokenScore(
        **known,
        vocab_size=counts.vocab_size,
        num_classes=plan.num_classes,
        images=plan.num_images,
        patches=round(cells.matrix.sum()),
        folds=plan.num_folds,
        bootstrap=bootstrap,
        seed=seed,
        notes=tuple(notes),
        intervals=intervals,
        replicates=replicates,
        plan=plan,
        classes=plan.classes,
        tokens=rows.tokens,
        token_classes=_token_classes(cells),
        **matrices,
    )


def check_options(bootstrap: int, seed: int) -> None:
    """Refuse numbers of replicates and seeds that mean nothing.

    Raises
    ------
    InputError
        A negative seed or number of replicates, or a single replicate.
    """
    if bootstrap < 0 or bootstrap == 1:
        raise InputError(f"bootstrap must be 0 (no intervals) or at least 2 replicates; got {bootstrap}.")
    if seed < 0:
        raise InputError(f"seed must not be negative; got {seed}.")


def _estimate(cells: RowCounts) -> tuple[dict[str, float], dict[str, Any]]:
    sums = TokenSummer(cells).sums(np.ones((1, cells.matrix.shape[0])))
    values = {name: float(value[0]) for name, value in figures(sums).items()}
    matrices: dict[str, Any] = {
        "prior": sums.prior[0],
        "walk": class_walk(sums)[0],
        "walk_crossfit": None if sums.cross is None else sums.cross[0],
    }
    return values, matrices


def _token_classes(cells: RowCounts) -> sparse.csr_matrix:
    rows = len(cells.row_class)
    gather = sparse.csr_matrix((np.ones(rows), (cells.row_class, np.arange(rows))), shape=(cells.num_classes, rows))
    return (gather @ cells.matrix).T.tocsr()
