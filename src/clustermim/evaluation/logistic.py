"""Multinomial logistic regression, fitted to its optimum by preconditioned L-BFGS.

minimise  mean cross-entropy(x·W + b, y) + weight_decay / 2 · ‖W‖²   over W (D, L) and b (L,), x standardised.

What makes it fast: the covariance of the features serves as a first guess of the Hessian (Böhning, "Multinomial
logistic regression algorithm", 1992, bounds the one by the other), which makes up for their being correlated; along a
search direction the logits are linear, so the line search needs no pass over the features; a cold fit begins on a part
of the rows; and logits lie class by class, which is the layout that a tall, narrow matrix product wants.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_HISTORY = 10
_LARGEST_COVARIANCE = 8192
"""Features wider than this are fitted without preconditioner: its factorisation would cost more than it saves."""

_PARTS = (16, 4)
"""A cold fit begins on every 16th row, then on every 4th, as long as these are four times as many as the features."""

TOLERANCE = 1e-6
"""How far above its minimum the objective may stay, as the Newton decrement estimates it."""


@dataclass(frozen=True)
class LogisticFit:
    """A fitted regression on standardised features."""

    weight: Float[Tensor, "d l"]
    bias: Float[Tensor, " l"]
    objective: float
    """Value of what was minimised."""
    iterations: int
    """Over all rows; those on a part of them are not counted."""
    converged: bool
    """Whether the objective came as near to its minimum as was asked for."""

    def logits(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m l"]:
        """Logits of standardised features."""
        return torch.addmm(self.bias, x, self.weight)


class _Problem:
    """Objective and gradient of one regression; parameters are one (L, D + 1) tensor, the bias its last column."""

    def __init__(self, x: Tensor, y: Tensor, num_classes: int, weight_decay: float) -> None:
        self.x, self.y, self.decay = x, y, weight_decay
        self.shape = (num_classes, x.shape[1] + 1)
        self.rows = torch.arange(len(y), device=y.device)

    def logits(self, parameters: Tensor) -> Tensor:
        """(L, n)."""
        return torch.addmm(parameters[:, -1:], parameters[:, :-1], self.x.T)

    def loss(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (float64) and its gradient on the logits, times n."""
        log_p = logits.log_softmax(dim=0)
        loss = -log_p[self.y, self.rows].double().mean()
        residual = log_p.exp_()
        residual[self.y, self.rows] -= 1
        return loss, residual

    def penalty(self, parameters: Tensor) -> Tensor:
        return 0.5 * self.decay * parameters[:, :-1].double().square().sum()

    def gradient(self, residual: Tensor, parameters: Tensor) -> Tensor:
        gradient = torch.empty_like(parameters)
        gradient[:, :-1] = residual @ self.x
        gradient[:, -1] = residual.sum(dim=1)
        gradient /= len(self.y)
        gradient[:, :-1] += self.decay * parameters[:, :-1]
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
            step[:, :-1] = gradient[:, :-1] / (self.curvature + self.decay)
        else:
            step[:, :-1] = torch.cholesky_solve(gradient[:, :-1].T, self.factor).T
        step[:, -1] = gradient[:, -1] / self.curvature
        return step


def covariance_of(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"] | None:
    """Second moments of standardised features from an even sample of rows; None where it would cost too much."""
    n, d = x.shape
    if d > _LARGEST_COVARIANCE:
        return None
    sample = x[:: max(1, n // (2 * d + 4096))]
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
    tolerance: float = TOLERANCE,
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
        An earlier fit to begin from; None begins on a part of the rows where there are many.
    covariance
        `covariance_of(x)`, where several fits share it; None computes it.
    max_iterations
        At most so many steps.
    tolerance
        Stop when the objective is estimated to lie no further than this above its minimum.

    Returns
    -------
    LogisticFit
        With the objective reached.
    """
    covariance = covariance if covariance is not None else covariance_of(x)
    if start is None:
        for part in _PARTS:
            if len(y) // part >= 4 * x.shape[1]:
                some = _Problem(x[::part].contiguous(), y[::part], num_classes, weight_decay)
                start = _minimise(some, start, covariance, max_iterations, max(tolerance, 1e-4))
    return _minimise(_Problem(x, y, num_classes, weight_decay), start, covariance, max_iterations, tolerance)


def _minimise(
    problem: _Problem, start: LogisticFit | None, covariance: Tensor | None, max_iterations: int, tolerance: float
) -> LogisticFit:
    parameters = problem.x.new_zeros(problem.shape)
    if start is not None:
        parameters[:, :-1], parameters[:, -1] = start.weight.T, start.bias
    logits = problem.logits(parameters)
    loss, residual = problem.loss(logits)
    value = loss + problem.penalty(parameters)
    # |residual| is 1 - p at the true class and p elsewhere: p(1 - p) is the same of both.
    curvature = float((residual.abs() * (1 - residual.abs())).mean().clamp(min=1e-4))
    metric = _Metric(covariance, curvature, problem.decay)
    gradient = problem.gradient(residual, parameters)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    iterations = 0
    while True:
        direction = _direction(gradient, steps, changes, metric)
        slope = float((direction.double() * gradient.double()).sum())
        if slope >= 0:  # rounding has spoilt the history: start it anew
            steps, changes = [], []
            direction = -metric(gradient)
            slope = float((direction.double() * gradient.double()).sum())
        # Half the slope is what a quadratic would fall by: with an inverse Hessian, the distance from the minimum.
        if -slope / 2 <= tolerance or iterations == max_iterations:
            break
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
    weight, bias = parameters[:, :-1].T.contiguous(), parameters[:, -1].clone()
    return LogisticFit(weight, bias, float(value), iterations, -slope / 2 <= 10 * tolerance)


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
    cross = problem.decay * float((parameters[:, :-1].double() * direction[:, :-1].double()).sum())
    square = problem.decay * float(direction[:, :-1].double().square().sum())
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
