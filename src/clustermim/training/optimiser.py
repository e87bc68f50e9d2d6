"""The optimiser and its schedule: AdamW without decay on what should not decay, cosine learning rate with warm-up."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEVER_DECAYED = ("cls_token", "reg_token", "mask_token", "pos_embed")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in two groups: matrices decay; biases, norms, tokens and positions do not.

    Parameters
    ----------
    model
        Any module; parameters that need no gradient are left out.
    weight_decay
        Decay of the first group.

    Returns
    -------
    list[dict]
        Two groups for an optimiser, with keys `params` and `weight_decay`; each in the model's own order.
    """
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spare = parameter.ndim < 2 or name.rsplit(".", 1)[-1].endswith(_NEVER_DECAYED)
        (spared if spare else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def make_adamw(
    model: nn.Module, *, lr: float, weight_decay: float = 0.05, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over `parameter_groups`, in its fused form: one kernel for all parameters.

    Parameters
    ----------
    model
        Already on its device.
    lr
        Learning rate at the first step; `set_learning_rate` moves it.
    weight_decay
        Decoupled decay of the matrices.
    betas
        Averaging of the gradient and of its square.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, fused=True)


def scaled_lr(base: float, batch_size: int) -> float:
    """The linear scaling rule (Goyal et al. 2017): `base` is the learning rate for 256 images a step."""
    return base * batch_size / 256


def cosine_with_warmup(step: int, total: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Learning rate of the update numbered `step`: a line up to `peak`, then half a cosine down towards `floor`.

    Parameters
    ----------
    step
        Number of the update, counted from 0.
    total
        Number of updates of the whole training.
    warmup
        Number of updates on the line; the last of them runs at `peak`.
    peak
        Highest learning rate.
    floor
        What the cosine would reach at update `total`, which is one past the last.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in groups:
        group["lr"] = lr
