"""`linear-mae` against an independent few-line reference: schedule, LARS step and batch-norm statistics."""

import math

import pytest
import torch

from clustermim.evaluation.linear_mae import LARS, Head, learning_rate, train_step


def test_fifty_steps_equal_a_reference_written_out() -> None:
    """float64 NumPy-like code: the schedule of the first epochs, batch norm by hand, gradients by formula, LARS."""
    generator = torch.Generator().manual_seed(0)
    dim, classes, batch, per_epoch, epochs, peak = 12, 4, 32, 5, 20, 3.2
    data = (torch.randn(50, batch, dim, generator=generator) * torch.logspace(-2, 1, dim) + 3).double()
    labels = torch.randint(classes, (50, batch), generator=generator)
    head = Head(dim, classes).double()
    optimiser = LARS(head.parameters(), weight_decay=0.01)
    w, b = head.linear.weight.detach().clone(), head.linear.bias.detach().clone()
    v_w, v_b = torch.zeros_like(w), torch.zeros_like(b)
    mean, var = torch.zeros(dim).double(), torch.ones(dim).double()
    for step in range(50):
        x, y = data[step], labels[step]
        t = step / per_epoch
        lr = peak * t / 2 if t < 2 else peak * (1 + math.cos(math.pi * (t - 2) / (epochs - 2))) / 2
        assert learning_rate(t, epochs, 2, peak) == pytest.approx(lr, abs=1e-12)

        train_step(head, optimiser, x, y, learning_rate(t, epochs, 2, peak))

        m = x.sum(0) / batch
        s = ((x - m) ** 2).sum(0) / batch
        mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * s * batch / (batch - 1)
        z = (x - m) / (s + 1e-6).sqrt()
        p = (z @ w.T + b).softmax(1)
        p[torch.arange(batch), y] -= 1
        g_w, g_b = p.T @ z / batch + 0.01 * w, p.sum(0) / batch
        v_w = 0.9 * v_w + g_w * 0.001 * w.norm() / g_w.norm()
        v_b = 0.9 * v_b + g_b
        w, b = w - lr * v_w, b - lr * v_b

        torch.testing.assert_close(head.linear.weight, w, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(head.linear.bias, b, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(head.norm.running_mean, mean, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(head.norm.running_var, var, rtol=1e-5, atol=1e-9)


def test_the_schedule_rises_to_its_peak_and_ends_at_zero() -> None:
    rates = [learning_rate(e / 10, 90, 10, 6.4) for e in range(901)]
    assert rates[0] == 0 and rates[100] == max(rates) == 6.4 and rates[900] == pytest.approx(0)
    assert rates[500] == pytest.approx(3.2)


def test_weights_of_zero_and_gradients_of_zero_do_no_harm() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimiser = LARS([weight], lr=1.0)
    weight.grad = torch.ones(2, 3)
    optimiser.step()
    assert torch.equal(weight, -torch.ones(2, 3))  # without a norm of its own it takes the plain step
    weight.grad = torch.zeros(2, 3)
    optimiser.step()
    assert weight.isfinite().all()


def test_it_learns_what_can_be_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    x = torch.nn.functional.one_hot(labels, 10) + 0.3 * torch.randn(120, 10, generator=generator)
    head = Head(10, 3)
    optimiser = LARS(head.parameters())
    for step in range(300):
        train_step(head, optimiser, x, labels, learning_rate(step / 10, 30, 3, 6.4))
    assert (head.eval()(x).argmax(1) == labels).float().mean() > 0.95
