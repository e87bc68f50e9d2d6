"""Training a VQ-VAE: the loop, from top to bottom, and what it is told."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from lightning_fabric import Fabric

from clustermim.data.loaders import Loader
from clustermim.errors import InputError
from clustermim.runs import RunDirectory
from clustermim.tokenizers.vqvae.model import VQVAE
from clustermim.tokenizers.vqvae.quantiser import EMAQuantiser, GumbelQuantiser, Quantiser
from clustermim.training.checkpoints import Checkpoints, Due, parse_interval
from clustermim.training.launch import Precision, StopRequest, agree
from clustermim.training.ledger import Ledger, check_weights
from clustermim.training.optimiser import cosine_with_warmup, make_adamw, set_learning_rate
from clustermim.training.progress import TrainingProgress
from clustermim.training.resuming import keep, raise_stopped, restore, snapshot

_ADVICE = "The last good checkpoint is kept. Lower --lr, or use --precision 32-true."
_IMAGES_TO_SEE = 400_000  # over all epochs, by default; more where that would be less than _FEWEST_EPOCHS
_FEWEST_EPOCHS, _MOST_EPOCHS = 5, 100
_WARMUP = 0.05  # share of the steps in which the learning rate rises
_COOLED = 0.75  # share of the steps after which the temperature stays at its lower end
_GRADIENT = 1.0  # largest norm of the gradient


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """Options of `--kind vqvae`."""

    estimator: Literal["ema", "gumbel"] = "ema"
    """How gradients pass the codes. ema: straight through, the codebook being running means (VQ-VAE); gumbel: relaxed
    draws of falling temperature (dVAE)."""

    epochs: int | None = None
    """Passes over the images. Default: as many as show 400,000 images, from 5 to 100."""

    lr: float = 1e-3
    """Highest learning rate of AdamW."""

    width: int = 64
    """Channels of the networks at the patch grid."""

    depth: int = 2
    """Residual blocks in each network at the patch grid."""

    code_dim: int = 32
    """Numbers in a code."""

    free: float = 0.1
    """Share of the steps at the start in which nothing is quantised, so that the first codes are put, by K-means, into
    a space that has taken shape."""

    ema_decay: float = 0.95
    """For ema: the share of itself that a code keeps at each step."""

    commitment: float = 0.25
    """For ema: weight of the encoder's distance from its codes."""

    restart_below: float = 0.1
    """For ema: a code used less than this share of an even use is put elsewhere; 0 for never."""

    kl_weight: float = 5e-4
    """For gumbel: weight of each patch's divergence from an even use of the codes, in nats."""

    temperature: Annotated[tuple[float, float], Parameter(negative="")] = (1.0, 0.0625)
    """For gumbel: temperature of the draws at the start, and after three quarters of the steps."""

    precision: Precision = "auto"
    """32-true, bf16-mixed, or auto: bf16-mixed on CUDA, else 32-true."""

    log_every: int = 20
    """Steps between rows of metrics.jsonl."""

    checkpoint_every: str = "500"
    """Steps (500) or time (10m) between checkpoints; the last two are kept."""

    max_minutes: float | None = None
    """Stop after so many minutes with a checkpoint and exit code 75; --resume continues exactly."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        for name in ("epochs", "width", "code_dim", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
        if self.depth < 0:
            raise InputError(f"--depth must be at least 0, not {self.depth}.")
        if not (0.0 < self.lr < math.inf):
            raise InputError(f"--lr must be above 0, not {self.lr:g}.")
        if self.estimator not in ("ema", "gumbel"):
            raise InputError(f"--estimator is ema or gumbel, not {self.estimator!r}.")
        if not 0.0 <= self.free < 1.0:
            raise InputError(f"--free is a share of the steps: at least 0 and below 1, not {self.free:g}.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise InputError(f"--ema-decay must be at least 0 and below 1, not {self.ema_decay:g}.")
        for name in ("commitment", "kl_weight"):
            if not (0.0 <= getattr(self, name) < math.inf):
                raise InputError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(self, name):g}.")
        if not 0.0 <= self.restart_below < 1.0:
            raise InputError(
                f"--restart-below is a share of an even use: at least 0 and below 1, not {self.restart_below:g}."
            )
        if not (0.0 < self.temperature[1] <= self.temperature[0] < math.inf):
            first, last = self.temperature
            raise InputError(
                f"--temperature takes the first and the last, falling and above 0, not {first:g} {last:g}."
            )
        parse_interval(self.checkpoint_every)

    @classmethod
    def picked(cls, settings: Mapping[str, Any], **more: Any) -> "VQVAEConfig":
        """With those of the settings that are its options, lists as tuples, and `more`."""
        known = {one.name for one in fields(cls)} & set(settings)
        chosen: dict[str, Any] = {key: tuple(v) if isinstance(v := settings[key], list) else v for key in known}
        return cls(**chosen, **more)

    def epochs_for(self, images: int) -> int:
        """The passes over so many images."""
        fitting = min(max(math.ceil(_IMAGES_TO_SEE / images), _FEWEST_EPOCHS), _MOST_EPOCHS)
        return fitting if self.epochs is None else self.epochs

    def free_steps(self, total: int) -> int:
        """Steps before there are codes."""
        return int(self.free * total)

    def make_quantiser(self, size: int, *, seed: int) -> Quantiser:
        """The bottleneck of the estimator."""
        if self.estimator == "gumbel":
            return GumbelQuantiser(size, self.code_dim, seed=seed, kl_weight=self.kl_weight)
        return EMAQuantiser(
            size,
            self.code_dim,
            seed=seed,
            decay=self.ema_decay,
            commitment=self.commitment,
            restart_below=self.restart_below,
        )

    def temperature_at(self, step: int, total: int) -> float | None:
        """None in the free steps; it falls exponentially up to three quarters of all steps, then stays."""
        if step < self.free_steps(total):
            return None
        first, last = self.temperature
        return float(first * (last / first) ** min(1.0, step / max(1.0, _COOLED * total)))


def train(
    fabric: Fabric,
    model: VQVAE,
    start: Callable[[VQVAE], None],
    loader: Loader,
    config: VQVAEConfig,
    run: RunDirectory | None = None,
    checkpoints: Checkpoints | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Train `model` in place, continuing from the latest checkpoint if there is one.

    Parameters
    ----------
    fabric
        Launched.
    model
        On any device; moved.
    start
        Gives the model its first codes, after the free steps.
    loader
        Of this process: train views.
    config
        How to train.
    run
        Takes the rows of metrics; None on all processes but the first, and where nothing is to be written.
    checkpoints
        Where to continue from and to write to; None for neither.
    stop
        Looked at between steps.

    Returns
    -------
    dict
        The last row of metrics: step, epoch, images, loss, reconstruction_mse, perplexity and used_codes over the
        steps since the row before, lr, seconds, images_per_second, and what belongs to the estimator.

    Raises
    ------
    NonFiniteLossError
        Names the step; the last good checkpoint is kept.
    Stopped
        On request, after a checkpoint.
    """
    steps, batch_size = len(loader), loader.batch_size * fabric.world_size
    epochs = config.epochs_for(loader.num_images)
    total = steps * epochs
    stop = stop or StopRequest()
    optimiser: Any = make_adamw(model, lr=config.lr, weight_decay=0.0, betas=(0.9, 0.99))
    forward, optimiser = fabric.setup(model.to(memory_format=torch.channels_last), optimiser)
    ledger = Ledger(fabric, _ADVICE)
    done, seconds, row = 0, 0.0, dict[str, Any]()
    if checkpoints is not None:
        done, seconds, row = restore(checkpoints, model, optimiser, ledger, run, fabric=fabric)
    saving = Due(parse_interval(config.checkpoint_every), done)
    began = marked = time.monotonic()
    marked_at = done

    with TrainingProgress(total, "VQ-VAE", start=done, show=fabric.is_global_zero and run is not None) as progress:
        if done:
            progress.say(f"Continuing from the checkpoint of step {done} of {total}.")
        for epoch in range(done // steps, epochs):
            batches = loader.epoch(epoch, start=done % steps)
            for step in range(done, (epoch + 1) * steps):
                if step == config.free_steps(total):
                    start(model)
                lr = cosine_with_warmup(step, total, round(_WARMUP * total), config.lr)
                set_learning_rate(optimiser.param_groups, lr)
                temperature = config.temperature_at(step, total)
                batch = next(batches)
                loss, figures = forward(batch.images, batch.index, step, temperature)
                fabric.backward(loss)
                fabric.clip_gradients(forward, optimiser, max_norm=_GRADIENT, error_if_nonfinite=False)
                optimiser.step()
                optimiser.zero_grad()
                ledger.add(step + 1, {"loss": loss, **figures})
                done = step + 1

                log = done % config.log_every == 0 or done == total
                if log:
                    means, now = ledger.close(), time.monotonic()
                    perplexity, used = model.quantiser.perplexity_and_used()
                    model.quantiser.forget_usage()
                    rate = (done - marked_at) * batch_size / max(now - marked, 1e-9)
                    row = {"step": done, "epoch": done / steps, "images": done * batch_size, "lr": lr, **means}
                    row |= {"perplexity": perplexity, "used_codes": used}
                    row |= {"temperature": temperature or 0.0} if config.estimator == "gumbel" else {}
                    row |= {"seconds": seconds + now - began, "images_per_second": rate}
                    marked, marked_at = now, done
                    if run is not None:
                        run.append_metrics(row)
                    news = f" · perplexity {perplexity:,.0f} of {model.quantiser.size:,}"
                    progress.update(done, loss=means["loss"], images_per_second=rate, extra=news)
                # Several processes must decide alike, so they ask each other, but only where they meet anyway.
                look = log or fabric.world_size == 1
                stopping = look and agree(fabric, stop.reason is not None)
                if stopping or done == total or (look and agree(fabric, saving.due(done))):
                    ledger.settle()
                    check_weights([*model.parameters(), model.quantiser.codes], done, _ADVICE)
                    saving.reset(done)
                    if run is not None and checkpoints is not None:
                        spent = seconds + time.monotonic() - began
                        keep(checkpoints, run, done, snapshot(model, optimiser, ledger, spent, row))
                if stopping and done < total:
                    raise_stopped(stop, done, total, "Training the VQ-VAE")
    return row
