"""The linear probe: its optimum against scikit-learn's, and its choice of weight decay."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from clustermim.evaluation.linear import WEIGHT_DECAYS, fit_linear, standardise
from clustermim.evaluation.logistic import LogisticFit, covariance_of, fit_logistic


def make_data(n: int, dim: int, classes: int, spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features on scales a hundred to one, unequal classes."""
    generator = torch.Generator().manual_seed(n + dim)
    mix = torch.randn(dim, dim, generator=generator) * torch.logspace(0, -2, dim)[:, None]
    labels = (torch.rand(n, generator=generator) ** 2 * classes).long()
    centres = spread * torch.randn(classes, dim, generator=generator)
    return (torch.randn(n, dim, generator=generator) + centres[labels]) @ mix, labels


def objective(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, decay: float) -> float:
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.double() + bias.double(), y)
    return float(loss + decay / 2 * weight.double().square().sum())


@pytest.mark.parametrize("decay", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize(("n", "dim", "classes"), [(600, 20, 4), (90, 150, 3)])
def test_reaches_scikit_learns_objective(n: int, dim: int, classes: int, decay: float) -> None:
    features, y = make_data(n, dim, classes)
    x, _, _ = standardise(features)
    fit = fit_logistic(x, y, classes, decay)
    theirs = LogisticRegression(C=1 / (decay * n), tol=1e-6, max_iter=5000).fit(x.double().numpy(), y.numpy())
    best = objective(x, y, torch.tensor(theirs.coef_.T), torch.tensor(theirs.intercept_), decay)
    ours = objective(x, y, fit.weight, fit.bias, decay)
    assert fit.converged and ours == pytest.approx(fit.objective, abs=1e-6)
    assert ours <= best + 1e-4
    assert ours >= best - 1e-4 or decay == 1e-5  # there scikit-learn may stop early
    predicted = (x @ fit.weight + fit.bias).argmax(1).numpy()
    assert abs((predicted == y.numpy()).mean() - theirs.score(x.numpy(), y.numpy())) <= 0.02


def test_two_classes_equal_the_softmax_optimum() -> None:
    x, y = make_data(300, 6, 2)
    x, _, _ = standardise(x)
    fit = fit_logistic(x, y, 2, 1e-2, tolerance=1e-11)
    parameters = torch.cat([fit.weight, fit.bias[None]]).double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x.double() @ parameters[:-1] + parameters[-1], y)
    (loss + 0.5e-2 * parameters[:-1].square().sum()).backward()
    assert parameters.grad is not None and parameters.grad.abs().max() < 5e-5


def test_start_and_preconditioner_do_not_move_the_optimum() -> None:
    features, y = make_data(400, 30, 5)
    x, _, _ = standardise(features)
    cold = fit_logistic(x, y, 5, 1e-3)
    warm = fit_logistic(x, y, 5, 1e-3, start=fit_logistic(x, y, 5, 1e-1), covariance=covariance_of(x))
    plain = fit_logistic(x, y, 5, 1e-3, covariance=torch.eye(30), max_iterations=3000, tolerance=1e-9)
    assert warm.objective == pytest.approx(cold.objective, abs=1e-5)
    assert plain.objective == pytest.approx(cold.objective, abs=1e-5)
    assert cold.iterations < plain.iterations


def test_beginning_on_a_part_of_the_rows_leads_to_the_same_optimum() -> None:
    features, y = make_data(4000, 12, 4)
    x, _, _ = standardise(features)
    # A start, even at zero, skips the parts.
    zero = LogisticFit(torch.zeros(12, 4), torch.zeros(4), 0.0, 0, False)
    whole, parts = fit_logistic(x, y, 4, 1e-3, start=zero), fit_logistic(x, y, 4, 1e-3)
    assert parts.objective == pytest.approx(whole.objective, abs=5e-6) and parts.converged
    assert parts.iterations < whole.iterations


def test_constant_and_duplicate_features_do_no_harm() -> None:
    features, y = make_data(200, 5, 3)
    awkward = torch.cat([features, features[:, :1], torch.full((200, 2), 1e4), torch.zeros(200, 1)], dim=1)
    x, _, std = standardise(awkward)
    assert x.isfinite().all() and not x[:, -3:].any() and (std > 0).all()
    assert fit_logistic(x, y, 3, 1e-4).converged


def test_weight_decay_is_chosen_on_validation_rows_and_the_last_fit_sees_all() -> None:
    features, labels = make_data(500, 40, 4, spread=0.3)
    validation = torch.arange(500) % 5 == 0
    judge = fit_linear(features, labels, 4, validation)
    assert judge.chosen["weight_decay"] in WEIGHT_DECAYS
    x, mean, std = standardise(features[~validation])
    held = (features[validation] - mean) / std
    fit = fit_logistic(x, labels[~validation], 4, judge.chosen["weight_decay"])
    top1 = ((held @ fit.weight + fit.bias).argmax(1) == labels[validation]).double().mean().item()
    assert judge.chosen["val_top1"] == pytest.approx(top1, abs=0.02)
    whole, whole_mean, _ = standardise(features)
    expected = fit_logistic(whole, labels, 4, judge.chosen["weight_decay"])
    assert judge.fit.objective == pytest.approx(expected.objective, abs=1e-5)
    torch.testing.assert_close(judge.mean, whole_mean)


def test_the_edge_of_the_grid_and_a_stopped_fit_are_told() -> None:
    features, labels = make_data(300, 10, 3)
    validation = torch.arange(300) % 5 == 0
    judge = fit_linear(features, labels, 3, validation, weight_decays=(1e-5, 1e-6))
    assert "end of the grid" in judge.chosen["note"]
    assert not fit_logistic(standardise(features)[0], labels, 3, 1e-6, max_iterations=1).converged
