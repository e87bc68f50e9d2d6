"""Fine-tuning: encoder and classifier trained together on labelled images; the loop, and what it is told."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from clustermim.data.loaders import Loader
from clustermim.errors import InputError
from clustermim.evaluation.augmenting import Mixing
from clustermim.evaluation.cache import join
from clustermim.evaluation.classifier import Classifier, layered_groups
from clustermim.runs import RunDirectory
from clustermim.training.checkpoints import Checkpoints, Due, Interval
from clustermim.training.launch import StopRequest, agree
from clustermim.training.ledger import Ledger, check_weights
from clustermim.training.optimiser import cosine_with_warmup, scaled_lr, set_learning_rate
from clustermim.training.progress import TrainingProgress
from clustermim.training.resuming import keep, raise_stopped, restore, snapshot

_ADVICE = "The last good checkpoint is kept. Lower --lr, set --clip-grad 1, or use --precision 32-true."


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How to fine-tune; the defaults are those of masked modelling's papers (BEiT, MAE) for a ViT-S or smaller.

    Attributes
    ----------
    epochs
        Passes over the training images; what is left over after the last whole step of a pass is not used in it.
    batch_size
        Images a step, over all processes.
    base_lr
        Learning rate for 256 images a step.
    weight_decay
        Of the matrices.
    layer_decay
        Factor of the learning rate from one layer to the next below.
    drop_path
        Share of the last block's branches that are dropped.
    mixup, cutmix
        Parameters of the beta distributions; 0 turns them off.
    smoothing
        Label smoothing.
    ema
        Decay of the averaged weights, which are judged beside the last ones; 0 keeps no average.
    warmup
        Share of the steps in which the learning rate rises.
    clip_grad
        Largest norm of the gradient, or None.
    seed
        Of order, views, RandAugment, mixing and drop path.
    log_every
        Steps between two rows of metrics.
    checkpoint_every
        Steps or seconds between two checkpoints.
    """

    epochs: int
    batch_size: int
    base_lr: float
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    drop_path: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    ema: float = 0.9999
    warmup: float = 0.1
    clip_grad: float | None = None
    seed: int = 0
    log_every: int = 20
    checkpoint_every: Interval = Interval(steps=500)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        for name in ("epochs", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1.")
        for name in ("drop_path", "smoothing", "ema", "warmup"):
            if not 0.0 <= getattr(self, name) < 1.0:
                flag = "label-smoothing" if name == "smoothing" else name.replace("_", "-")
                raise InputError(f"--{flag} {getattr(self, name)} must be at least 0 and below 1.")
        if self.mixup < 0 or self.cutmix < 0 or self.weight_decay < 0 or not 0 < self.layer_decay <= 1:
            raise InputError(
                "--mixup, --cutmix and --weight-decay must not be negative, and --layer-decay is above 0 and at most 1."
            )
        if not self.base_lr > 0.0 or (self.clip_grad is not None and self.clip_grad <= 0.0):
            raise InputError("--lr and --clip-grad must be above 0.")


class Bundle(nn.Module):
    """A classifier and the moving average of its weights, which a checkpoint holds together."""

    def __init__(self, classifier: Classifier, decay: float) -> None:
        super().__init__()
        self.classifier = classifier
        # Warm-up: the average of few steps must not be mostly the weights before the first.
        self.ema = ModelEmaV3(classifier, decay=decay, use_warmup=True).requires_grad_(False) if decay > 0 else None

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the weights in training."""
        return self.classifier(images)  # type: ignore[no-any-return]

    def judged(self) -> dict[str, nn.Module]:
        """What is judged at the end: `last`, and `ema` where there is one."""
        return {"last": self.classifier} | ({} if self.ema is None else {"ema": self.ema.module})


def finetune_loop(
    fabric: Fabric,
    bundle: Bundle,
    loader: Loader,
    config: FinetuneConfig,
    run: RunDirectory | None,
    checkpoints: Checkpoints,
    stop: StopRequest,
) -> dict[str, Any]:
    """Train in place, continuing from the latest checkpoint if there is one.

    Parameters
    ----------
    fabric
        Launched.
    bundle
        What is trained; moved to the device.
    loader
        Training images of this process.
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
    steps = len(loader)
    total = steps * config.epochs
    peak, warmup = scaled_lr(config.base_lr, config.batch_size), round(config.warmup * total)
    num_classes = bundle.classifier.head.out_features
    mixing = Mixing(config.mixup, config.cutmix, config.smoothing, num_classes, config.seed)
    groups = layered_groups(bundle.classifier, config.weight_decay, config.layer_decay)
    made = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), fused=True)
    wrapped: Any = fabric.setup(bundle, made)
    forward, optimiser = wrapped
    ledger = Ledger(fabric, _ADVICE)
    done, seconds, row = restore(checkpoints, bundle, optimiser, ledger, run, fabric=fabric)
    saving = Due(config.checkpoint_every, done)
    began = marked = time.monotonic()
    marked_at = done
    bundle.classifier.train()

    with TrainingProgress(total, "finetune", start=done, show=fabric.is_global_zero) as progress:
        if done:
            progress.say(f"Continuing from the checkpoint of step {done} of {total}.")
        for epoch in range(done // steps, config.epochs):
            batches = loader.epoch(epoch, start=done % steps)
            for step in range(done, (epoch + 1) * steps):
                lr = cosine_with_warmup(step, total, warmup, peak)
                for group in optimiser.param_groups:
                    set_learning_rate([group], lr * group["lr_scale"])
                batch = next(batches)
                assert batch.labels is not None, "the caller has asked for labels"
                images, targets = mixing(batch.images, batch.labels, step, fabric.global_rank)
                # Drop path draws from the global generator: set by step, so that a continued run draws alike.
                torch.manual_seed(config.seed * 1_000_003 + step * fabric.world_size + fabric.global_rank)
                loss = nn.functional.cross_entropy(forward(images).float(), targets)
                fabric.backward(loss)
                ledger.add(step + 1, {"loss": loss})
                if config.clip_grad is not None:
                    fabric.clip_gradients(forward, optimiser, max_norm=config.clip_grad, error_if_nonfinite=False)
                optimiser.step()
                optimiser.zero_grad()
                done = step + 1
                if bundle.ema is not None:
                    bundle.ema.update(bundle.classifier, step=done)

                log = done % config.log_every == 0 or done == total
                if log:
                    means, now = ledger.close(), time.monotonic()
                    rate = (done - marked_at) * config.batch_size / max(now - marked, 1e-9)
                    row = {"step": done, "epoch": done / steps, "images": done * config.batch_size, "lr": lr, **means}
                    row |= {"seconds": seconds + now - began, "images_per_second": rate}
                    marked, marked_at = now, done
                    if run is not None:
                        run.append_metrics(row)
                    progress.update(done, loss=means["loss"], images_per_second=rate)
                look = log or fabric.world_size == 1
                stopping = look and agree(fabric, stop.reason is not None)
                if stopping or done == total or (look and agree(fabric, saving.due(done))):
                    ledger.settle()
                    check_weights(bundle.parameters(), done, _ADVICE)
                    saving.reset(done)
                    if run is not None:
                        spent = seconds + time.monotonic() - began
                        keep(checkpoints, run, done, snapshot(bundle, optimiser, ledger, spent, row))
                if stopping and done < total:
                    raise_stopped(stop, done, total, "Fine-tuning")
    return row


def logits_of(model: nn.Module, loader: Loader, fabric: Fabric) -> Tensor:
    """(n, L) logits of every image of a loader (eval views), in its order, on the CPU."""
    model = model.to(fabric.device).eval()
    with torch.inference_mode():
        return join(torch.cat([model(batch.images).float() for batch in loader.epoch()]), fabric)
