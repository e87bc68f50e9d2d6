"""Masked pretraining: the loop, from top to bottom, and what it is told."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from lightning_fabric import Fabric
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from clustermim.data.loaders import Batch, Loader
from clustermim.data.masks import block_masks, hidden_count, part_of_masks, random_masks
from clustermim.errors import InputError, nearest
from clustermim.mim.contract import MaskedModel
from clustermim.mim.costs import peak_flops, training_flops
from clustermim.mim.lean_blocks import make_lean
from clustermim.mim.targets import Target, TargetLoss
from clustermim.mim.watching import Watchers
from clustermim.runs import RunDirectory
from clustermim.training.checkpoints import Checkpoints, Due, Interval
from clustermim.training.launch import StopRequest, agree, by_the_first
from clustermim.training.ledger import Ledger, check_weights
from clustermim.training.optimiser import cosine_with_warmup, make_adamw, scaled_lr, set_learning_rate
from clustermim.training.progress import TrainingProgress
from clustermim.training.resuming import keep, raise_stopped, restore, snapshot, unsynchronised
from clustermim.training.sharding import set_up

MaskKind = Literal["random", "block"]

_ADVICE = (
    "The last good checkpoint is kept. Continue from it with --resume and a lower --lr, --clip-grad 1 or --precision "
    "32-true; unchanged, it comes back unless a passing fault of the machine was behind it."
)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How to train. One step is one update of the weights; just one of `epochs` and `steps` is set.

    Attributes
    ----------
    epochs
        Passes over the data; the images left over after the last whole step of a pass are not used in it.
    steps
        Steps of the whole training, over as many passes as that takes; the last may end early.
    batch_size
        Images a step, over all processes and accumulated parts.
    base_lr
        Learning rate for 256 images a step; see `scaled_lr`.
    mask_ratio
        Share of the patches to hide.
    mask_kind
        `random` (MAE) or `block` (BEiT).
    predict_ratio
        Share of the hidden patches to predict in each step.
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
    ema
        Decay of a running mean of the encoder's weights, or None for none. It warms up, so short runs have a use of it.
    cache_ids
        Whether to compute token ids once an image where views repeat; None: where that changes no id.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int
    base_lr: float
    mask_ratio: float = 0.75
    mask_kind: MaskKind = "random"
    predict_ratio: float = 1.0
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip_grad: float | None = None
    accumulate: int = 1
    seed: int = 0
    log_every: int = 20
    checkpoint_every: Interval = Interval(steps=500)  # noqa: RUF009 - frozen
    compile: bool = False
    ema: float | None = None
    cache_ids: bool | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        if (self.epochs is None) == (self.steps is None):
            given = "both are given" if self.steps is not None else "neither is given"
            raise InputError(f"--epochs or --steps says how long to train, but {given}: choose one.")
        for name in ("epochs", "steps", "batch_size", "accumulate", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1.")
        if not 0.0 <= self.warmup < 1.0:
            raise InputError(f"--warmup {self.warmup} is a share of the training: at least 0 and below 1.")
        if not self.base_lr > 0.0 or self.weight_decay < 0.0 or (self.clip_grad is not None and self.clip_grad <= 0.0):
            raise InputError("--lr and --clip-grad must be above 0, and --weight-decay must not be negative.")
        if self.mask_kind not in get_args(MaskKind):
            raise InputError(
                f"There is no --mask-kind {self.mask_kind!r}.{nearest(self.mask_kind, get_args(MaskKind))}"
            )
        if not 0.0 < self.predict_ratio <= 1.0:
            raise InputError(
                f"--predict-ratio {self.predict_ratio} is a share of the hidden patches: above 0, at most 1."
            )
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise InputError(f"--ema {self.ema} is the decay of a running mean: above 0 and below 1, such as 0.999.")

    def total_steps(self, per_epoch: int) -> int:
        """Steps of the whole training, where a pass over the data has `per_epoch`."""
        return self.steps if self.steps is not None else (self.epochs or 0) * per_epoch

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
    """A `MaskedModel`, bare or wrapped for its device."""

    def __call__(
        self,
        images: Tensor,
        mask: Tensor,
        hidden: int | None = None,
        asked: Tensor | None = None,
        count: int | None = None,
    ) -> Tensor:
        """Predictions for the patches asked for."""


@dataclass(frozen=True)
class Masking:
    """What training hides of an image, and what it asks for: both functions of (seed, epoch, index).

    Attributes
    ----------
    config
        Seed, ratios and kind.
    grid
        Patches down and across.
    """

    config: PretrainConfig
    grid: tuple[int, int]

    @property
    def hidden(self) -> int:
        """Patches hidden of each image."""
        return hidden_count(self.grid[0] * self.grid[1], self.config.mask_ratio)

    @property
    def asked(self) -> int:
        """Hidden patches of each image that are predicted."""
        return max(1, round(self.hidden * self.config.predict_ratio))

    def draw(self, epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N) each: True where a patch is hidden, and True where it is asked for."""
        config, (rows, columns) = self.config, self.grid
        if config.mask_kind == "block":
            mask = block_masks(config.seed, epoch, index, self.grid, config.mask_ratio)
        else:
            mask = random_masks(config.seed, epoch, index, rows * columns, config.mask_ratio)
        if self.asked == self.hidden:
            return mask, mask
        return mask, part_of_masks(config.seed, epoch, index, mask, self.asked)


def masked_loss(forward: Forward, target: Target, batch: Batch, masking: Masking, epoch: int) -> TargetLoss:
    """The loss of one batch in one epoch: the whole of masked image modelling."""
    mask, asked = masking.draw(epoch, batch.index)
    predictions = forward(batch.images, mask, masking.hidden, None if asked is mask else asked, masking.asked)
    beside: dict[str, Any] = {"index": batch.index, "labels": batch.labels, "keys": batch.keys}
    return target(predictions, batch.images, asked, **beside)  # type: ignore[no-any-return]


def train(
    fabric: Fabric,
    model: MaskedModel,
    target: Target,
    loader: Loader,
    config: PretrainConfig,
    run: RunDirectory | None,
    checkpoints: Checkpoints,
    stop: StopRequest,
    watchers: Watchers | None = None,
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
        Held; None on all processes but the first.
    checkpoints
        Where to continue from and to write to.
    stop
        Looked at between steps.
    watchers
        Take the rows of metrics, and more; None: only `metrics.jsonl` does.

    Returns
    -------
    dict
        The last row of metrics. Where `config.ema` is set, the encoder of `model` ends as its running mean.

    Raises
    ------
    NonFiniteLossError
        Names the step; the last good checkpoint is kept.
    Stopped
        On request, after a checkpoint.
    """
    steps = len(loader) // config.accumulate
    total = config.total_steps(steps)
    peak, warmup = scaled_lr(config.base_lr, config.batch_size), round(config.warmup * total)
    masking = Masking(config, model.grid)
    flops = training_flops(model, masking.hidden, masking.asked)
    able = peak_flops(fabric.device, str(fabric.strategy.precision.precision))
    choose_kernels(model, fabric)
    make = partial(make_adamw, lr=peak, weight_decay=config.weight_decay)
    forward, optimiser = set_up(fabric, compiled(model) if config.compile else model, make)
    predict = keeping_width(forward, fabric)
    fabric.to_device(target)
    kept = target.keep_what_repeats(loader, config.cache_ids)
    ledger, watchers = Ledger(fabric, _ADVICE), watchers or Watchers(fabric, run)
    mean = running_mean(model, config.ema)
    done, seconds, row = restore(checkpoints, model, optimiser, ledger, run, mean, fabric)
    saving = Due(config.checkpoint_every, done)
    began = marked = time.monotonic()
    marked_at = done

    with TrainingProgress(total, "pretrain", start=done, show=fabric.is_global_zero) as progress:
        if done:
            progress.say(f"Continuing from the checkpoint of step {done} of {total}.")
        if kept:
            progress.say(kept)
        watchers.begin(progress, done, total, steps, config.batch_size)
        for epoch in range(done // steps, -(-total // steps)):
            parts = loader.epoch(epoch, start=(done % steps) * config.accumulate)
            for step in range(done, min(total, (epoch + 1) * steps)):
                lr = cosine_with_warmup(step, total, warmup, peak)
                set_learning_rate(optimiser.param_groups, lr)
                for part in range(config.accumulate):
                    batch = next(parts)
                    with unsynchronised(fabric, forward, part < config.accumulate - 1):
                        loss, figures = masked_loss(predict, target, batch, masking, epoch)
                        fabric.backward(loss / config.accumulate)
                    ledger.add(step + 1, {"loss": loss, **figures})
                if config.clip_grad is not None:
                    fabric.clip_gradients(forward, optimiser, max_norm=config.clip_grad, error_if_nonfinite=False)
                optimiser.step()
                optimiser.zero_grad()
                if mean is not None:
                    mean.update(model.encoder, step=step)
                done = step + 1

                log = done % config.log_every == 0 or done == total
                if log:
                    means, now = ledger.close(), time.monotonic()
                    rate = (done - marked_at) * config.batch_size / max(now - marked, 1e-9)
                    row = {"step": done, "epoch": done / steps, "images": done * config.batch_size, "lr": lr, **means}
                    row |= {"seconds": seconds + now - began, "images_per_second": rate}
                    if able is not None:
                        row["mfu"] = rate * flops / (able * fabric.world_size)
                    marked, marked_at = now, done
                    watchers.record(row)
                    extra = f" · accuracy {means['accuracy']:.3f}" if "accuracy" in means else ""
                    extra += f" · lr {lr:.2e}" + (f" · MFU {row['mfu']:.0%}" if able is not None else "")
                    extra += watchers.news
                    progress.update(done, loss=means["loss"], images_per_second=rate, extra=extra)
                marked += watchers.look(done, model, mean)
                # Several processes must decide alike, so they ask each other, but only where they meet anyway.
                look = log or fabric.world_size == 1
                stopping = look and agree(fabric, stop.reason is not None)
                if stopping or done == total or (look and agree(fabric, saving.due(done))):
                    ledger.settle()
                    check_weights(model.parameters(), done, _ADVICE)
                    saving.reset(done)
                    spent = seconds + time.monotonic() - began
                    state = snapshot(model, optimiser, ledger, spent, row, mean)
                    by_the_first(fabric, keep, checkpoints, run, done, state)
                if stopping and done < total:
                    raise_stopped(stop, done, total, "Pretraining")
    if mean is not None:
        model.encoder.load_state_dict(mean.module.state_dict())
    return row


def keeping_width(forward: Any, fabric: Fabric) -> Forward:
    """Where the model computes in 64 bits, its predictions in them: Fabric would return torch's default precision."""

    def wide(*arguments: Any) -> Any:
        with fabric.strategy.precision.tensor_init_context():
            return forward(*arguments)

    found: Any = wide if str(fabric.strategy.precision.precision) == "64-true" else forward
    return found  # type: ignore[no-any-return]


def running_mean(model: MaskedModel, decay: float | None) -> ModelEmaV3 | None:
    """A running mean of the encoder's weights, starting from where they are."""
    return None if decay is None else ModelEmaV3(model.encoder, decay=decay, use_warmup=True)


def compiled(model: nn.Module) -> nn.Module:
    """The model behind `torch.compile`, sharing its weights."""
    found: Any = torch.compile(model)
    return found  # type: ignore[no-any-return]


def choose_kernels(model: nn.Module, fabric: Fabric) -> None:
    """On a CPU, compute blocks as `lean_blocks` does, which `torch.compile` then leaves alone: it made them slower."""
    if fabric.device.type == "cpu":
        make_lean(model)
