"""Linear probe: multinomial logistic regression on frozen features, fitted to its optimum by preconditioned L-BFGS.

minimise  mean cross-entropy(x·W + b, y) + weight_decay / 2 · ‖W‖²   over W (D, L) and b (L,), x standardised.

Each step costs two passes over the features: along a search direction the logits are linear, so that the line search
needs none. The covariance of the features serves as a first guess of the Hessian (Böhning, "Multinomial logistic
regression algorithm", 1992, bounds the one by the other), which makes up for their being correlated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

WEIGHT_DECAYS = tuple(10.0 ** (-half / 2) for half in range(-4, 17))
"""100 to 10⁻⁸ in half decades, the strongest first: each fit starts from the one before."""

_HISTORY = 10
_LARGEST_COVARIANCE = 8192
"""Features wider than this are fitted without preconditioner: its factorisation would cost more than it saves."""


@dataclass(frozen=True)
class LogisticFit:
    """A fitted regression on standardised features."""

    weight: Float[Tensor, "d l"]
    bias: Float[Tensor, " l"]
    objective: float
    """Value of what was minimised."""
    iterations: int
    converged: bool
    """Whether the gradient came under the tolerance."""


class _Problem:
    """Objective and gradient of one regression; parameters are one (D + 1, L) tensor, the bias its last row."""

    def __init__(self, x: Tensor, y: Tensor, num_classes: int, weight_decay: float) -> None:
        self.x, self.y, self.decay = x, y, weight_decay
        self.shape = (x.shape[1] + 1, num_classes)
        self.rows = torch.arange(len(y), device=y.device)

    def logits(self, parameters: Tensor) -> Tensor:
        return torch.addmm(parameters[-1], self.x, parameters[:-1])

    def loss(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (float64) and its gradient on the logits, times n."""
        log_p = logits.log_softmax(dim=1)
        loss = -log_p[self.rows, self.y].double().mean()
        residual = log_p.exp_()
        residual[self.rows, self.y] -= 1
        return loss, residual

    def penalty(self, parameters: Tensor) -> Tensor:
        return 0.5 * self.decay * parameters[:-1].double().square().sum()

    def gradient(self, residual: Tensor, parameters: Tensor) -> Tensor:
        gradient = torch.empty_like(parameters)
        torch.mm(self.x.T, residual, out=gradient[:-1])
        gradient[-1] = residual.sum(dim=0)
        gradient /= len(self.y)
        gradient[:-1] += self.decay * parameters[:-1]
        return gradient


class _Metric:
    """First guess of the inverse Hessian: that of curvature · covariance + weight decay, the same for every class."""

    def __init__(self, covariance: Tensor | None, curvature: float, decay: float) -> None:
        self.curvature, self.decay, self.factor = curvature, decay, None
        if covariance is not None:
            matrix = covariance * curvature
            # The covariance is that of a sample and float32: what it takes for flat directions may not be quite flat.
            matrix.diagonal().add_(decay + 1e-4 * matrix.diagonal().mean() + 1e-12)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            self.factor = factor if int(failed) == 0 else None

    def __call__(self, gradient: Tensor) -> Tensor:
        step = torch.empty_like(gradient)
        if self.factor is None:
            step[:-1] = gradient[:-1] / (self.curvature + self.decay)
        else:
            step[:-1] = torch.cholesky_solve(gradient[:-1], self.factor)
        step[-1] = gradient[-1] / self.curvature
        return step


def covariance_of(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"] | None:
    """Second moments of standardised features from an even sample of rows; None where it would cost too much."""
    n, d = x.shape
    if d > _LARGEST_COVARIANCE:
        return None
    sample = x[:: max(1, n // (4 * d + 4096))]
    return sample.T @ sample / len(sample)


def fit_logistic(
    x: Float[Tensor, "n d"],
    y: Int64[Tensor, " n"],
    num_classes: int,
    weight_decay: float,
    *,
    start: LogisticFit | None = None,
    covariance: Float[Tensor, "d d"] | None = None,
    max_iterations: int = 500,
    tolerance: float = 1e-5,
) -> LogisticFit:
    """Fit one regression to its optimum.

    Parameters
    ----------
    x, y
        Standardised features and classes.
    num_classes
        Number of classes.
    weight_decay
        Of the weights; the bias has none. 1 / (C·n) in scikit-learn's terms.
    start
        An earlier fit to begin from.
    covariance
        `covariance_of(x)`, where several fits share it; None computes it.
    max_iterations
        At most so many steps.
    tolerance
        On the largest entry of the gradient.

    Returns
    -------
    LogisticFit
        With the objective reached.
    """
    problem = _Problem(x, y, num_classes, weight_decay)
    parameters = x.new_zeros(problem.shape)
    if start is not None:
        parameters[:-1], parameters[-1] = start.weight, start.bias
    logits = problem.logits(parameters)
    loss, residual = problem.loss(logits)
    value = loss + problem.penalty(parameters)
    probability = residual.clone()
    probability[problem.rows, y] += 1
    curvature = float((probability * (1 - probability)).mean().clamp(min=1e-4))
    metric = _Metric(covariance if covariance is not None else covariance_of(x), curvature, weight_decay)
    gradient = problem.gradient(residual, parameters)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    iterations = 0
    while float(gradient.abs().max()) > tolerance and iterations < max_iterations:
        direction = _direction(gradient, steps, changes, metric)
        slope = float((direction.double() * gradient.double()).sum())
        if slope >= 0:  # rounding has spoilt the history: start it anew
            steps, changes = [], []
            direction = -metric(gradient)
            slope = float((direction.double() * gradient.double()).sum())
        found = _search(problem, parameters, direction, logits, float(value), slope)
        if found is None:  # as near as float32 can tell
            break
        length, logits, value, residual = found
        step = length * direction
        parameters = parameters + step
        new_gradient = problem.gradient(residual, parameters)
        change = new_gradient - gradient
        if float((change * step).sum()) > 0:
            steps, changes = [*steps[1 - _HISTORY :], step], [*changes[1 - _HISTORY :], change]
        gradient = new_gradient
        iterations += 1
    converged = float(gradient.abs().max()) <= 10 * tolerance
    return LogisticFit(parameters[:-1], parameters[-1], float(value), iterations, converged)


def _direction(gradient: Tensor, steps: list[Tensor], changes: list[Tensor], metric: _Metric) -> Tensor:
    """The L-BFGS direction (two-loop recursion; Nocedal and Wright, algorithm 7.4) with `metric` at its heart."""
    q = gradient.clone()
    alphas = []
    for step, change in zip(reversed(steps), reversed(changes), strict=True):
        rho = 1 / (change * step).sum()
        alphas.append((rho, rho * (step * q).sum()))
        q -= alphas[-1][1] * change
    r = metric(q)
    if steps:
        # Scale the guess so that it is right along the last step.
        bent = metric(changes[-1])
        r *= (steps[-1] * changes[-1]).sum() / (changes[-1] * bent).sum()
    for (rho, alpha), step, change in zip(reversed(alphas), steps, changes, strict=True):
        r += (alpha - rho * (change * r).sum()) * step
    return -r


def _search(
    problem: _Problem, parameters: Tensor, direction: Tensor, logits: Tensor, value: float, slope: float
) -> tuple[float, Tensor, Tensor, Tensor] | None:
    """A step length that satisfies the weak Wolfe conditions, by bisection; no pass over the features but one.

    Returns the length, the logits, the objective and the residual there; None when no length makes progress.
    """
    along = problem.logits(direction)
    n = len(problem.y)
    cross = problem.decay * float((parameters[:-1].double() * direction[:-1].double()).sum())
    square = problem.decay * float(direction[:-1].double().square().sum())
    penalty = float(problem.penalty(parameters))
    slack = 1e-7 * abs(value)  # what float32 cannot tell apart
    low, high, length = 0.0, float("inf"), 1.0
    for _ in range(25):
        there = torch.add(logits, along, alpha=length)
        loss, residual = problem.loss(there)
        new = loss + penalty + length * cross + 0.5 * length**2 * square
        new_slope = float((residual * along).sum()) / n + cross + length * square
        if not float(new) <= value + 1e-4 * length * slope + slack:
            high = length
        elif new_slope < 0.9 * slope:
            low = length
        else:
            return (length, there, new, residual) if value - float(new) > -slack else None
        length = 2 * low if high == float("inf") else 0.5 * (low + high)
    return None


class LinearJudge:
    """A linear classifier on raw features: the standardisation is part of it."""

    def __init__(self, fit: LogisticFit, mean: Tensor, std: Tensor, chosen: dict[str, Any]) -> None:
        self.fit, self.mean, self.std, self.chosen = fit, mean, std, chosen

    def predict(self, features: Float[Tensor, "m d"]) -> Int64[Tensor, " m"]:
        """The class of each row."""
        return _logits(self.fit, (features - self.mean) / self.std).argmax(dim=1)


def _logits(fit: LogisticFit, x: Tensor) -> Tensor:
    return torch.addmm(fit.bias, x, fit.weight)


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
        fit = fit_logistic(x, y, num_classes, decay, start=fit, covariance=covariance)
        top1 = (_logits(fit, held).argmax(dim=1) == truth).double().mean().item()
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
    final = fit_logistic(x, labels, num_classes, decay, start=fit)
    chosen: dict[str, Any] = {"val_top1": top1, "weight_decay": decay, "iterations": final.iterations}
    notes = []
    if not final.converged:
        notes.append(f"stopped after {final.iterations} iterations before the optimum")
    if decay in (weight_decays[0], weight_decays[-1]) and len(weight_decays) > 1:
        notes.append("the best weight decay is at the end of the grid")
    if notes:
        chosen["note"] = "; ".join(notes)
    return LinearJudge(final, mean, std, chosen)
