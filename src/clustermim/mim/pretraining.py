"""Masked pretraining: the loop, from top to bottom, and what it is told."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from lightning_fabric import Fabric
from timm.layers.attention import Attention
from torch import Tensor, nn

from clustermim.data.loaders import Batch, Loader
from clustermim.data.masks import hidden_count, random_masks
from clustermim.errors import InputError
from clustermim.mim.model import MaskedImageModel
from clustermim.mim.targets import Target, TargetLoss
from clustermim.runs import RunDirectory
from clustermim.training.checkpoints import Checkpoints, Due, Interval
from clustermim.training.launch import StopRequest, agree
from clustermim.training.ledger import Ledger, check_weights
from clustermim.training.optimiser import cosine_with_warmup, make_adamw, scaled_lr, set_learning_rate
from clustermim.training.progress import TrainingProgress
from clustermim.training.resuming import raise_stopped, restore, snapshot, unsynchronised

_ADVICE = "The last good checkpoint is kept. Lower --lr, set --clip-grad 1, or use --precision 32-true."


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How to train. One step is one update of the weights.

    Attributes
    ----------
    epochs
        Passes over the data; the images left over after the last whole step of a pass are not used in it.
    batch_size
        Images a step, over all processes and accumulated parts.
    base_lr
        Learning rate for 256 images a step; see `scaled_lr`.
    mask_ratio
        Share of the patches to hide.
    weight_decay
        Of the matrices; biases, norms, tokens and positions have none.
    warmup
        Share of the steps in which the learning rate rises.
    clip_grad
        Largest norm of the gradient, or None for no limit.
    accumulate
        Parts in which a step's images are computed, to save memory; the result is the same.
    seed
        Of the order, the views and the masks.
    log_every
        Steps between two rows of `metrics.jsonl`.
    checkpoint_every
        Steps or seconds between two checkpoints.
    compile
        Compile the model with `torch.compile`.
    """

    epochs: int
    batch_size: int
    base_lr: float
    mask_ratio: float = 0.75
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip_grad: float | None = None
    accumulate: int = 1
    seed: int = 0
    log_every: int = 20
    checkpoint_every: Interval = Interval(steps=500)  # noqa: RUF009 - frozen
    compile: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        for name, low in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("log_every", 1)):
            if getattr(self, name) < low:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {low}.")
        if not 0.0 <= self.warmup < 1.0:
            raise InputError(f"--warmup {self.warmup} is a share of the training: at least 0 and below 1.")
        if not self.base_lr > 0.0 or self.weight_decay < 0.0 or (self.clip_grad is not None and self.clip_grad <= 0.0):
            raise InputError("--lr and --clip-grad must be above 0, and --weight-decay must not be negative.")

    def part_size(self, processes: int) -> int:
        """Images that one process computes at a time.

        Raises
        ------
        InputError
            The batch cannot be divided evenly.
        """
        parts = processes * self.accumulate
        if self.batch_size % parts:
            fitting = max(parts, self.batch_size - self.batch_size % parts)
            raise InputError(
                f"--batch-size {self.batch_size} cannot be divided over {processes} process(es) times "
                f"{self.accumulate} accumulated part(s). Use a multiple of {parts}, such as {fitting}."
            )
        return self.batch_size // parts


@runtime_checkable
class Forward(Protocol):
    """A `MaskedImageModel`, bare or wrapped for its device."""

    def __call__(self, images: Tensor, mask: Tensor, hidden: int | None = None) -> Tensor:
        """Predictions for the hidden patches."""


Masks = Callable[[int, Tensor], Tensor]


def make_masks(config: PretrainConfig, num_patches: int) -> Masks:
    """The function (epoch, index of the images) -> mask that training draws from."""
    return lambda epoch, index: random_masks(config.seed, epoch, index, num_patches, config.mask_ratio)


def masked_loss(forward: Forward, target: Target, batch: Batch, mask: Tensor, hidden: int) -> TargetLoss:
    """The loss of one batch under one mask: the whole of masked image modelling."""
    predictions = forward(batch.images, mask, hidden)
    return target(predictions, batch.images, mask, index=batch.index, labels=batch.labels)  # type: ignore[no-any-return]


def train(
    fabric: Fabric,
    model: MaskedImageModel,
    target: Target,
    loader: Loader,
    config: PretrainConfig,
    run: RunDirectory | None,
    checkpoints: Checkpoints,
    stop: StopRequest,
) -> dict[str, Any]:
    """Train `model` in place, continuing from the latest checkpoint if there is one.

    Parameters
    ----------
    fabric
        Launched.
    model, target
        On any device; moved.
    loader
        Of this process, its batch size being `config.part_size`.
    config
        How to train.
    run
        Takes the rows of metrics; None on all processes but the first.
    checkpoints
        Where to continue from and to write to.
    stop
        Looked at between steps.

    Returns
    -------
    dict
        The last row of metrics.

    Raises
    ------
    NonFiniteLossError
        Names the step; the last good checkpoint is kept.
    Stopped
        On request, after a checkpoint.
    """
    steps = len(loader) // config.accumulate
    total = steps * config.epochs
    peak, warmup = scaled_lr(config.base_lr, config.batch_size), round(config.warmup * total)
    hidden, masks = hidden_count(model.num_patches, config.mask_ratio), make_masks(config, model.num_patches)
    choose_attention(model, fabric)
    optimiser: Any = make_adamw(model, lr=peak, weight_decay=config.weight_decay)
    forward, optimiser = fabric.setup(compiled(model) if config.compile else model, optimiser)
    fabric.to_device(target)
    ledger = Ledger(fabric, _ADVICE)
    done, seconds, row = restore(checkpoints, model, optimiser, ledger, run)
    saving = Due(config.checkpoint_every, done)
    began = marked = time.monotonic()
    marked_at = done

    with TrainingProgress(total, "pretrain", start=done, show=fabric.is_global_zero) as progress:
        if done:
            progress.say(f"Continuing from the checkpoint of step {done} of {total}.")
        for epoch in range(done // steps, config.epochs):
            parts = loader.epoch(epoch, start=(done % steps) * config.accumulate)
            for step in range(done, (epoch + 1) * steps):
                lr = cosine_with_warmup(step, total, warmup, peak)
                set_learning_rate(optimiser.param_groups, lr)
                for part in range(config.accumulate):
                    batch = next(parts)
                    with unsynchronised(fabric, forward, part < config.accumulate - 1):
                        loss, figures = masked_loss(forward, target, batch, masks(epoch, batch.index), hidden)
                        fabric.backward(loss / config.accumulate)
                    ledger.add(step + 1, {"loss": loss, **figures})
                if config.clip_grad is not None:
                    fabric.clip_gradients(forward, optimiser, max_norm=config.clip_grad, error_if_nonfinite=False)
                optimiser.step()
                optimiser.zero_grad()
                done = step + 1

                log = done % config.log_every == 0 or done == total
                if log:
                    means, now = ledger.close(), time.monotonic()
                    rate = (done - marked_at) * config.batch_size / max(now - marked, 1e-9)
                    row = {"step": done, "epoch": done / steps, "images": done * config.batch_size, "lr": lr, **means}
                    row |= {"seconds": seconds + now - began, "images_per_second": rate}
                    marked, marked_at = now, done
                    if run is not None:
                        run.append_metrics(row)
                    extra = f" · accuracy {means['accuracy']:.3f}" if "accuracy" in means else ""
                    progress.update(done, loss=means["loss"], images_per_second=rate, extra=extra)
                # Several processes must decide alike, so they ask each other, but only where they meet anyway.
                look = log or fabric.world_size == 1
                stopping = look and agree(fabric, stop.reason is not None)
                if stopping or done == total or (look and agree(fabric, saving.due(done))):
                    ledger.settle()
                    check_weights(model.parameters(), done, _ADVICE)
                    saving.reset(done)
                    if run is not None:
                        spent = seconds + time.monotonic() - began
                        checkpoints.save(done, snapshot(model, optimiser, ledger, spent, row))
                if stopping and done < total:
                    raise_stopped(stop, done, total, "Pretraining")
    return row


def compiled(model: nn.Module) -> nn.Module:
    """The model behind `torch.compile`, sharing its weights."""
    found: Any = torch.compile(model)
    return found  # type: ignore[no-any-return]


def choose_attention(model: nn.Module, fabric: Fabric) -> None:
    """On a CPU in bfloat16, write attention out as products: PyTorch's fused backward is ten times slower there."""
    if fabric.device.type == "cpu" and "bf16" in str(fabric.strategy.precision.precision):
        for module in model.modules():
            if isinstance(module, Attention):
                module.fused_attn = False  # type: ignore[misc]  # final only for TorchScript
