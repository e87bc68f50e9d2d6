"""Linear probe: multinomial logistic regression on frozen features, its weight decay chosen on part of train."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from clustermim.evaluation.judging import Scores
from clustermim.evaluation.logistic import LogisticFit, covariance_of, fit_logistic

WEIGHT_DECAYS = tuple(10.0 ** (-half / 2) for half in range(-4, 17))
"""100 to 10⁻⁸ in half decades, the strongest first: each fit starts from the one before."""

_COARSE = 1e-5
"""Distance from the optimum while weight decays are compared: the accuracy does not move any more."""


class LinearJudge:
    """A linear classifier on raw features: the standardisation is part of it."""

    def __init__(self, fit: LogisticFit, mean: Tensor, std: Tensor, chosen: dict[str, Any]) -> None:
        self.fit, self.mean, self.std, self.chosen = fit, mean, std, chosen

    def answer(self, features: Float[Tensor, "m d"]) -> Scores:
        """Logits of each row."""
        return Scores(self.fit.logits((features - self.mean) / self.std))


def standardise(features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Tensor, Tensor]:
    """Features with mean 0 and standard deviation 1 in each dimension, and the two; constant dimensions become 0."""
    mean = features.mean(dim=0)
    std = features.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * (1e-6 + features.abs().amax(dim=0)), std, torch.ones_like(std))
    return (features - mean) / std, mean, std


def fit_linear(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    validation: Bool[Tensor, " n"],
    *,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    patience: int = 3,
) -> LinearJudge:
    """Choose the weight decay on the validation rows of train, then fit on all of train.

    Parameters
    ----------
    features, labels
        Of the training images.
    num_classes
        Number of classes.
    validation
        True for the rows that the weight decay is chosen on.
    weight_decays
        Candidates, the strongest first. The strongest of equally good ones wins.
    patience
        Stop after so many candidates in a row that do worse than the best: weaker ones only overfit, and take longest.

    Returns
    -------
    LinearJudge
        `chosen` holds `weight_decay`, `val_top1`, `iterations` of the last fit, and a `note` where the optimum was not
        reached or the best weight decay is at the end of the grid.
    """
    x, mean, std = standardise(features[~validation])
    y = labels[~validation]
    held, truth = (features[validation] - mean) / std, labels[validation]
    covariance = covariance_of(x)
    fit: LogisticFit | None = None
    best: tuple[float, float, LogisticFit] | None = None
    worse = 0
    for decay in weight_decays:
        fit = fit_logistic(x, y, num_classes, decay, start=fit, covariance=covariance, tolerance=_COARSE)
        top1 = (fit.logits(held).argmax(dim=1) == truth).double().mean().item()
        if best is None or top1 > best[0]:
            best, worse = (top1, decay, fit), 0
        else:
            worse += 1
            if worse >= patience:
                break
    assert best is not None, "at least one weight decay is needed"
    top1, decay, fit = best
    del x, held
    x, mean, std = standardise(features)
    # The covariance of most rows serves all of them: a guess need not be exact.
    final = fit_logistic(x, labels, num_classes, decay, start=fit, covariance=covariance)
    chosen: dict[str, Any] = {"val_top1": top1, "weight_decay": decay, "iterations": final.iterations}
    notes = []
    if not final.converged:
        notes.append(f"stopped after {final.iterations} iterations before the optimum")
    if decay in (weight_decays[0], weight_decays[-1]) and len(weight_decays) > 1:
        notes.append("the best weight decay is at the end of the grid")
    if notes:
        chosen["note"] = "; ".join(notes)
    return LinearJudge(final, mean, std, chosen)
