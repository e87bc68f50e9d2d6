"""The schedule in closed form, and what decays."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.training.optimiser import cosine_with_warmup, make_adamw, parameter_groups, scaled_lr


@given(st.integers(1, 500), st.floats(0, 0.9), st.floats(1e-6, 1))
@settings(deadline=None, max_examples=50)
def test_schedule(total, share, peak):
    warmup = int(share * total)
    lrs = [cosine_with_warmup(step, total, warmup, peak) for step in range(total)]
    assert all(0 < lr <= peak * (1 + 1e-12) for lr in lrs)
    assert lrs[warmup] == pytest.approx(peak)
    assert all(a < b for a, b in pairwise(lrs[:warmup]))
    assert all(a >= b for a, b in pairwise(lrs[warmup:]))
    assert cosine_with_warmup(total, total, warmup, peak, floor=0.0) == pytest.approx(0.0, abs=1e-12)


def test_schedule_in_closed_form():
    assert [cosine_with_warmup(s, 12, 2, 1.0) for s in (0, 1)] == [0.5, 1.0]
    for step in range(2, 12):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 10)) / 2
        assert cosine_with_warmup(step, 12, 2, 1.0, floor=0.1) == pytest.approx(expected)
    assert scaled_lr(1e-3, 512) == 2e-3


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Conv2d(1, 2, 3))
    model.register_parameter("cls_token", torch.nn.Parameter(torch.zeros(1, 1, 4)))
    model.register_parameter("decoder_pos_embed", torch.nn.Parameter(torch.zeros(1, 5, 4), requires_grad=False))
    decayed, spared = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3), (2, 1, 3, 3)]
    assert sum(p.numel() for p in spared["params"]) == 4 + 4 + 4 + 2 + 4
    assert make_adamw(model, lr=0.1).param_groups[0]["betas"] == (0.9, 0.95)
