"""Few-shot: logistic regression on 1, 2, 5 and 10 images a class, the mean over ten draws and its interval.

So few images leave none to choose a weight decay on, and validation images would be more labels than the shots; so it
is the same everywhere: features are standardised with the statistics of all training images, which takes no labels, and
scaled so that an image has length 1 on average, whatever their dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy import stats
from torch import Tensor

from clustermim.data.counted import Stream, counter_hash
from clustermim.errors import InputError
from clustermim.evaluation.judging import LEVEL, Figures, Truth
from clustermim.evaluation.linear import standardise
from clustermim.evaluation.logistic import fit_logistic

SHOTS = (1, 2, 5, 10)
DRAWS = 10
WEIGHT_DECAY = 1e-2


@dataclass(frozen=True)
class Draws:
    """What the classifiers of all draws said: `predicted[shots]` is (draws, m)."""

    predicted: dict[int, Int64[Tensor, "draws m"]]

    def figures(self, truth: Truth) -> list[Figures]:
        """A row for each number of shots: `top1` is the mean over the draws, with its 95 % interval of Student's t."""
        rows = []
        for shots, predicted in self.predicted.items():
            top1 = (predicted == truth.labels).double().mean(dim=1)
            mean, spread = top1.mean().item(), top1.std().item() if len(top1) > 1 else math.nan
            half = float(stats.t.ppf((1 + LEVEL) / 2, len(top1) - 1)) * spread / math.sqrt(len(top1))
            rows.append({"shots": shots, "top1": mean, "top1_low": mean - half, "top1_high": mean + half})
            rows[-1] |= {"top1_std": spread, "draws": len(top1)}
        return rows


class FewShotJudge:
    """A linear classifier for each number of shots and draw."""

    def __init__(self, fits: dict[int, list[tuple[Tensor, Tensor]]], mean: Tensor, std: Tensor, chosen: Any) -> None:
        self.fits, self.mean, self.std, self.chosen = fits, mean, std, chosen

    def answer(self, features: Float[Tensor, "m d"]) -> Draws:
        """The predictions of each classifier."""
        x = (features - self.mean) / self.std
        return Draws(
            {
                shots: torch.stack([torch.addmm(b, x, w).argmax(dim=1).cpu() for w, b in fits])
                for shots, fits in self.fits.items()
            }
        )


def fit_fewshot(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    *,
    shots: Sequence[int] = SHOTS,
    draws: int = DRAWS,
    seed: int = 0,
) -> FewShotJudge:
    """Fit a classifier to each draw of so many images a class.

    Parameters
    ----------
    features, labels
        Of the training images.
    num_classes
        Number of classes.
    shots
        Images a class.
    draws
        Draws for each; the draw of five shots contains that of two, and so on.
    seed
        Of the draws.
    """
    x, mean, std = standardise(features)
    scale = x.shape[1] ** 0.5
    fits: dict[int, list[tuple[Tensor, Tensor]]] = {count: [] for count in shots}
    for draw in range(draws):
        order = draw_order(labels.cpu(), seed, draw)
        for count in shots:
            rows = order[:, :count].flatten().to(x.device)
            some, classes = x[rows] / scale, labels[rows]
            # The optimum lies in the span of the few images, so the fit is as wide as they are many.
            basis = torch.linalg.qr(some.T).Q
            fit = fit_logistic(some @ basis, classes, num_classes, WEIGHT_DECAY)
            fits[count].append((basis @ fit.weight / scale, fit.bias))
    return FewShotJudge(fits, mean, std, {"weight_decay": WEIGHT_DECAY})


def draw_order(labels: Int64[Tensor, " n"], seed: int, draw: int) -> Int64[Tensor, "l shots"]:
    """For each class the rows of its images in random order, cut to the length of the smallest class."""
    key = counter_hash(seed, Stream.SAMPLE, draw, torch.arange(len(labels)))
    shuffled = key.argsort(stable=True)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    smallest = int(counts.min())
    return by_class[starts[:, None] + torch.arange(smallest)]


def check_shots(labels: np.ndarray, names: Sequence[str] | None, shots: Sequence[int], draws: int) -> None:
    """Check that every class has as many training images as shots are asked for.

    Raises
    ------
    InputError
        Names the class that has fewest; or a number of shots or draws that cannot be meant.
    """
    if not shots or min(shots) < 1 or draws < 2:
        raise InputError(
            f"--shots {' '.join(map(str, shots))} --draws {draws}: shots must be at least 1, and an interval needs at "
            f"least 2 draws."
        )
    values, counts = np.unique(labels, return_counts=True)
    fewest = int(counts.argmin())
    if counts[fewest] < max(shots):
        name = names[int(values[fewest])] if names else str(values[fewest])
        fits = [str(count) for count in shots if count <= counts[fewest]]
        remedy = f"use --shots {' '.join(fits)}" if fits else "leave out fewshot"
        raise InputError(
            f"Few-shot with {max(shots)} images a class is not possible: class {name!r} has {counts[fewest]} training "
            f"image(s). Bring more, or {remedy}."
        )
