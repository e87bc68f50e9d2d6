"""`clustermim pretrain`: learn an encoder by predicting something of the hidden patches of images."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from clustermim.data.masks import hidden_count
from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.streaming.opening import open_images, require_labelled
from clustermim.data.streaming.order import StreamOptions
from clustermim.data.streaming.source import StreamSource
from clustermim.encoders.weights import fingerprint_of
from clustermim.errors import InputError
from clustermim.mim.building import EncoderKind, build_model
from clustermim.mim.cached_ids import check_cached_ids
from clustermim.mim.estimate import estimate
from clustermim.mim.model import DecoderKind
from clustermim.mim.pretraining import MaskKind, PretrainConfig
from clustermim.mim.starting import continue_from
from clustermim.mim.targets import TargetOptions, make_target
from clustermim.runs import RunDirectory
from clustermim.tokenizers.tokenizer import load_tokenizer
from clustermim.training.checkpoints import parse_interval
from clustermim.training.launch import Device, Precision, Strategy, make_fabric
from clustermim.training.trouble import advice
from clustermim.verbs.pretrain_run import (
    PretrainResult,
    carry_out,
    check_batch,
    check_strategy,
    settle_patch_size,
    tokenizer_from_run,
    training_loader,
)
from clustermim.verbs.pretrain_targets import (
    TokenWeights,
    check_target_options,
    target_features,
    weigh_by_frequency,
)
from clustermim.verbs.pretrain_watch import VOLATILE, WatchOptions, plan_watch

KIND = "pretrain"
_VOLATILE = (
    *("device", "devices", "strategy", "workers", "resident", "compile"),
    *("accumulate", "activation_checkpointing", "checkpoint_every", "log_every", "cache_ids"),
    *VOLATILE,
)
_EPOCHS = 100
_MENDABLE = ("lr", "clip_grad", "precision")


def pretrain(
    data: Annotated[Any, Parameter()] = "digits",
    *,
    out: Path,
    target: str = "token",
    tokenizer: Annotated[Any, Parameter()] = None,
    model: str = "vit_micro",
    patch_size: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 256,
    lr: float | None = None,
    mask_ratio: float = 0.75,
    mask_kind: MaskKind = "random",
    predict_ratio: float = 1.0,
    norm_pix: bool = True,
    label_smoothing: float = 0.0,
    soft_targets: float = 0.0,
    token_weights: TokenWeights = "equal",
    cache_ids: bool | None = None,
    features: Annotated[Any, Parameter()] = None,
    feature_norm: bool | None = None,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    clip_grad: float | None = None,
    accumulate: int = 1,
    activation_checkpointing: bool = False,
    encoder: EncoderKind = "visible",
    decoder: DecoderKind = "self",
    decoder_dim: int | None = None,
    decoder_depth: int | None = None,
    decoder_heads: int | None = None,
    init: str | Path | None = None,
    ema: float | None = None,
    precision: Precision = "auto",
    device: Device = "auto",
    devices: int = 1,
    strategy: Strategy = "auto",
    workers: int | None = None,
    resident: bool | None = None,
    compile: bool = False,
    checkpoint_every: str = "500",
    log_every: int = 20,
    max_minutes: float | None = None,
    seed: int = 0,
    resume: bool = False,
    dry_run: bool = False,
    watch: Annotated[WatchOptions | None, Parameter(name="*", group="Watching")] = None,
    stream: Annotated[StreamOptions | None, Parameter(name="*", group="Only for streams (wds:, hf-stream:)")] = None,
    options: Annotated[DataOptions, Parameter(name="*")] = DEFAULTS,
) -> PretrainResult:
    """Pretrain a ViT by masked image modelling.

    Most patches of an image are hidden; the encoder sees the others, and a light decoder predicts something of the
    hidden ones: their tokens (ClusterMIM), their pixels (MAE), or a description (MaskFeat, distillation).
    OUT/encoder.safetensors is a plain timm ViT. With --encoder full --mask-kind block it is BEiT's way.

    Parameters
    ----------
    data
        Images: `digits`, a path, or in Python an array or a Dataset. No labels are needed. More than fits here is read
        as a stream: `wds:shards/train-{000..099}.tar`, `hf-stream:` and a folder of parquet or a data set of the hub.
    out
        Run directory to make.
    target
        What to predict of hidden patches: `token` (needs --tokenizer), `pixel`, or `feature` (needs --features).
    tokenizer
        Folder that `clustermim tokenizer fit` made, for --target token.
    model
        `vit_micro`, `vit_ti`, `vit_s`, `vit_b`, `vit_l`, or any plain timm ViT.
    patch_size
        Patch side in pixels; default: the tokenizer's.
    epochs
        Passes over the images. Default: 100, unless --steps says how long to train.
    steps
        Train for so many updates of the weights instead, over as many passes as that takes.
    batch_size
        Images a step, over all devices and accumulated parts together.
    lr
        Learning rate for 256 images a step: lr × batch-size / 256 is used. Default: 1e-3 for tokens, 1.5e-4 else.
    mask_ratio
        Share of the patches to hide.
    mask_kind
        `random` patches (MAE), or rectangular `block`s of them (BEiT).
    predict_ratio
        Share of the hidden patches to predict in each step, others each epoch; needs --decoder cross where below 1.
    norm_pix
        For --target pixel: bring each target patch to mean 0, variance 1.
    label_smoothing
        For --target token: share of the probability that is spread over all tokens.
    soft_targets
        For --target token: 0 predicts the nearest centroid's id; above, a softmax over distances to centroids of this
        temperature, in units of the mean distance of neighbouring centroids.
    token_weights
        For --target token: `equal`, or `inverse-sqrt`: weight 1/√frequency, counted in one pass before training.
    cache_ids
        For --target token: compute the ids of an image once and keep them in memory (a byte a patch up to 256 tokens),
        where views are the same in every epoch (--no-flip --crop-scale 1 1). Default: where that changes no id. Of
        networks and whitened features, whose rounding depends on the batch, ids are kept where it is asked for.
    features
        For --target feature: `hog` (MaskFeat), `backbone:<timm name>[@file]` (distillation), or any of tokenizer fit's.
    feature_norm
        For --target feature: bring each patch's description to mean 0, variance 1. Default: all but `hog`.
    weight_decay
        Of the weight matrices.
    warmup
        Share of the training in which the learning rate rises.
    clip_grad
        Largest norm of the gradient; default: no limit.
    accumulate
        Compute each step in so many parts, to save memory; the result is the same.
    activation_checkpointing
        Keep only each block's input and compute the block again for its gradient: less memory, a third more time, the
        same result.
    encoder
        `visible`: it sees visible patches only. `full`: it sees mask tokens too, and a linear head predicts (BEiT).
    decoder
        `self`: mask tokens and visible patches attend to each other (MAE). `cross`: each mask token attends to visible
        patches only (CrossMAE).
    decoder_dim
        Width of the decoder; default: what goes with the model, as for the next two.
    decoder_depth
        Blocks of the decoder.
    decoder_heads
        Attention heads of the decoder.
    init
        Continue from the encoder of this run directory, weights file or `timm:<name>[@file]`.
    ema
        Keep a running mean of the encoder's weights with this decay (such as 0.999), and leave it as the encoder.
    precision
        `32-true`, `bf16-mixed`, `64-true`, or `auto`: bf16-mixed on CUDA, else 32-true.
    device
        `auto` takes CUDA, else MPS, else the CPU.
    devices
        How many of them; under torchrun or SLURM their count is taken from there.
    strategy
        `ddp`: every device holds all weights. `fsdp`: each holds a part of weights and optimiser, for models that do
        not fit on one; on CUDA, and on a CPU for tests. `auto`: `ddp` where there are several. Checkpoints fit either.
    workers
        Processes that read images; default: as many as help.
    resident
        Keep all images in the device's memory; default: if they fit.
    compile
        Compile the model with torch.compile: minutes at the start, faster steps.
    checkpoint_every
        Steps (`500`) or time (`10m`) between checkpoints; the last two are kept.
    log_every
        Steps between rows of metrics.jsonl.
    max_minutes
        Stop after so many minutes with a checkpoint and exit code 75; --resume continues exactly.
    seed
        Of the weights, the order, the views and the masks.
    resume
        Start, continue exactly, or do nothing if OUT is finished.
    dry_run
        Write nothing; say how large the model is and, from a few measured steps, how long the run takes.
    watch
        Loggers, pictures and a k-NN probe every few epochs.
    stream
        How an epoch over a stream is shuffled.
    options
        How images are read and viewed.

    Returns
    -------
    PretrainResult
        Where the encoder is, and the last figures.

    Raises
    ------
    InputError
        Something does not fit; found before any training.
    NonFiniteLossError
        The loss became NaN or infinite; the last good checkpoint is kept, and a resumption may change `lr`,
        `clip_grad` and `precision`.
    Stopped
        On SIGTERM, SIGUSR1, SIGHUP or at `max_minutes`, after a checkpoint.
    ResourceError
        Disk, memory or a process gave out; the last good checkpoint is kept.
    """
    fabric = make_fabric(device, devices, precision, strategy)
    check_strategy(strategy, ema, compile)
    check_target_options(
        target,
        token={
            "tokenizer": tokenizer,
            "label_smoothing": label_smoothing or None,
            "soft_targets": soft_targets or None,
            "token_weights": None if token_weights == "equal" else token_weights,
            "cache_ids": cache_ids,
        },
        pixel={"norm_pix": None if norm_pix else norm_pix},
        feature={"features": features, "feature_norm": feature_norm},
    )
    check_predict_ratio(predict_ratio, decoder)
    tokens = load_tokenizer(tokenizer) if target == "token" and tokenizer is not None else None
    source = open_images(data, options if tokens is None else tokens.fill_options(options), stream)
    view = source.view
    side = settle_patch_size(patch_size, tokens, view)
    described = None if target != "feature" else target_features(features, side, source, batch_size, workers)
    wanted = make_target(
        target,
        TargetOptions(
            patch_size=side,
            mean=view.mean,
            std=view.std,
            tokenizer=tokens,
            label_smoothing=label_smoothing,
            soft=soft_targets,
            norm_pix=norm_pix,
            features=described,
            feature_norm=feature_norm,
        ),
    )
    if cache_ids:
        check_cached_ids(view, soft_targets)
    if "labels" in wanted.requires:
        require_labelled(source, f"The tokenizer {tokenizer}")
    epochs = _EPOCHS if epochs is None and steps is None else epochs
    config = PretrainConfig(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        base_lr=wanted.base_lr if lr is None else lr,
        mask_ratio=mask_ratio,
        mask_kind=mask_kind,
        predict_ratio=predict_ratio,
        weight_decay=weight_decay,
        warmup=warmup,
        clip_grad=clip_grad,
        accumulate=accumulate,
        seed=seed,
        log_every=log_every,
        checkpoint_every=parse_interval(checkpoint_every),
        compile=compile,
        ema=ema,
        cache_ids=cache_ids,
    )
    built, recipe = build_model(
        model,
        image_size=view.image_size,
        patch_size=side,
        channels=view.channels,
        output_dim=wanted.output_dim,
        mean=view.mean,
        std=view.std,
        seed=seed,
        encoder=encoder,
        decoder=decoder,
        decoder_dim=decoder_dim,
        decoder_depth=decoder_depth,
        decoder_heads=decoder_heads,
    )
    if init is not None:
        continue_from(built, init)
    built.encoder.set_grad_checkpointing(activation_checkpointing)
    hidden_count(built.num_patches, mask_ratio)
    check_batch(source, config, fabric.world_size)
    watching = plan_watch(watch, source, options, wanted)

    settings = {
        "data": str(data) if isinstance(data, str | Path) else source.name,
        "target": target,
        "tokenizer": str(tokenizer) if isinstance(tokenizer, str | Path) else None,
        "model": model,
        "patch_size": side,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "lr": config.base_lr,
        "mask_ratio": mask_ratio,
        "mask_kind": mask_kind,
        "predict_ratio": predict_ratio,
        "norm_pix": norm_pix,
        "label_smoothing": label_smoothing,
        "soft_targets": soft_targets,
        "token_weights": token_weights,
        "cache_ids": cache_ids,
        "features": None if described is None else described.spec,
        "feature_norm": feature_norm,
        "encoder": encoder,
        "decoder": decoder,
        "ema": ema,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "clip_grad": clip_grad,
        "accumulate": accumulate,
        "activation_checkpointing": activation_checkpointing,
        "decoder_dim": decoder_dim,
        "decoder_depth": decoder_depth,
        "decoder_heads": decoder_heads,
        "init": init,
        "precision": str(fabric.strategy.precision.precision),
        "device": device,
        "devices": devices,
        "strategy": strategy,
        "workers": workers,
        "resident": resident,
        "compile": compile,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
        "seed": seed,
        **watching.settings(),
        **(asdict(source.order) if isinstance(source, StreamSource) else {}),
        **asdict(options),
        **{key: getattr(view, key) for key in ("image_size", "channels", "mean", "std", "flip", "crop_scale")},
    }
    facts = {
        "model": recipe,
        "model_preset": model,
        "patch_size": side,
        "target": target,
        "seed": seed,
        "data": {"name": source.name, "split": source.split, "images": len(source), "classes": source.classes}
        | view.to_dict(),
        "data_fingerprint": source.fingerprint(),
        "tokenizer": str(tokenizer) if isinstance(tokenizer, str | Path) else None,
        "tokenizer_from_here": tokenizer_from_run(out, tokenizer),
        "tokenizer_fingerprint": None if tokens is None else tokens.fingerprint(),
        "norm_pix": norm_pix if target == "pixel" else None,
        "features_fingerprint": None
        if described is None
        else fingerprint_of(described.config(), described.state_dict()),
        "architecture": {"encoder": encoder, "decoder": decoder if encoder == "visible" else None},
        "ema": ema,
    }
    fabric.launch()
    if message := source.skipped_message() if fabric.is_global_zero else None:
        Console(stderr=True).print(message, markup=False, highlight=False)
    with advice(batch_size, accumulate=accumulate, processes=fabric.world_size):
        if token_weights == "inverse-sqrt":
            weigh_by_frequency(wanted, source, fabric, batch_size, workers)
        if dry_run:
            figures = estimate(
                fabric, built, wanted, training_loader(source, view, config, fabric, workers, resident), config
            )
            return PretrainResult(out=None, model=recipe, figures=figures)
        plain = {key: value for key, value in settings.items() if value is not None}
        run = RunDirectory(out, KIND, plain, resume=resume, volatile=_VOLATILE, mendable=_MENDABLE)
        limits = (workers, resident, max_minutes)
        return carry_out(fabric, built, wanted, (source, view), config, run, facts, limits, watching)


def check_predict_ratio(predict_ratio: float, decoder: DecoderKind) -> None:
    """Refuse to predict a part of the hidden patches where that changes what is predicted of the rest.

    Raises
    ------
    InputError
        The decoder lets mask tokens see each other.
    """
    if predict_ratio < 1.0 and decoder != "cross":
        raise InputError(
            f"--predict-ratio {predict_ratio} needs --decoder cross: elsewhere mask tokens see each other, so "
            "leaving some out changes what is predicted of the rest."
        )
