"""`clustermim pretrain`: learn an encoder by predicting something of the hidden patches of images."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from lightning_fabric import Fabric
from rich.console import Console
from rich.table import Table

from clustermim.data.loaders import Loader, make_loader
from clustermim.data.masks import hidden_count
from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.sources import ImageSource, open_source, require_labels
from clustermim.data.views import ViewConfig
from clustermim.errors import InputError
from clustermim.mim.estimate import estimate
from clustermim.mim.model import MaskedImageModel, build_model
from clustermim.mim.pretraining import PretrainConfig, train
from clustermim.mim.starting import ENCODER_FILE, continue_from, save_weights
from clustermim.mim.targets import TARGETS, Target, TargetOptions, make_target
from clustermim.runs import RunDirectory
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer
from clustermim.training.checkpoints import Checkpoints, parse_interval
from clustermim.training.launch import Device, Precision, enter_on_first, listen_for_stop, make_fabric, memory_advice
from clustermim.training.progress import duration

KIND = "pretrain"
_VOLATILE = ("device", "devices", "workers", "resident", "compile", "accumulate", "checkpoint_every", "log_every")


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """What a pretraining left behind, or, of a dry run, what it would take.

    Attributes
    ----------
    out
        The run directory; None for a dry run. `open_encoder(out)` and timm open it.
    model
        ``{"name", "kwargs"}`` for ``timm.create_model``.
    figures
        The last row of metrics (step, epoch, images, loss, ...), or the estimate.
    """

    out: Path | None
    model: dict[str, Any]
    figures: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """One flat record."""
        return [{"run": None if self.out is None else str(self.out), "model": self.model["name"], **self.figures}]

    def __rich__(self) -> Table:
        """A table of two columns for the terminal."""
        title = "Dry run: nothing was written" if self.out is None else f"Pretrained encoder: {self.out / ENCODER_FILE}"
        table = Table(title=title, show_header=False, title_justify="left")
        for key, value in self.figures.items():
            table.add_row(key.replace("_", " "), _shown(key, value))
        return table


def _shown(key: str, value: Any) -> str:
    if key == "seconds":
        return duration(float(value))
    if key == "memory_bytes":
        return f"{value / 2**20:,.0f} MiB"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def pretrain(
    data: Annotated[Any, Parameter()] = "digits",
    *,
    out: Path,
    target: str = "token",
    tokenizer: Annotated[Any, Parameter()] = None,
    model: str = "vit_micro",
    patch_size: int | None = None,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float | None = None,
    mask_ratio: float = 0.75,
    norm_pix: bool = True,
    label_smoothing: float = 0.0,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    clip_grad: float | None = None,
    accumulate: int = 1,
    decoder_dim: int | None = None,
    decoder_depth: int | None = None,
    decoder_heads: int | None = None,
    init: str | Path | None = None,
    precision: Precision = "auto",
    device: Device = "auto",
    devices: int = 1,
    workers: int | None = None,
    resident: bool | None = None,
    compile: bool = False,
    checkpoint_every: str = "500",
    log_every: int = 20,
    max_minutes: float | None = None,
    seed: int = 0,
    resume: bool = False,
    dry_run: bool = False,
    options: Annotated[DataOptions, Parameter(name="*")] = DEFAULTS,
) -> PretrainResult:
    """Pretrain a ViT by masked image modelling.

    Most patches of an image are hidden; the encoder sees the others, and a light decoder predicts something of the
    hidden ones: their tokens (ClusterMIM) or their pixels (MAE). OUT/encoder.safetensors is a plain timm ViT.

    Parameters
    ----------
    data
        Images: `digits`, a path, or in Python an array or a Dataset. No labels are needed.
    out
        Run directory to make.
    target
        What to predict of hidden patches: `token` (needs --tokenizer) or `pixel`.
    tokenizer
        Folder that `clustermim tokenizer fit` made, for --target token.
    model
        `vit_micro`, `vit_ti`, `vit_s`, `vit_b`, `vit_l`, or any plain timm ViT.
    patch_size
        Patch side in pixels; default: the tokenizer's.
    epochs
        Passes over the images.
    batch_size
        Images a step, over all devices and accumulated parts together.
    lr
        Learning rate for 256 images a step: lr × batch-size / 256 is used. Default: 1e-3 for tokens, 1.5e-4 for
        pixels.
    mask_ratio
        Share of the patches to hide.
    norm_pix
        For --target pixel: bring each target patch to mean 0, variance 1.
    label_smoothing
        For --target token: share of the probability that is spread over all tokens.
    weight_decay
        Of the weight matrices.
    warmup
        Share of the training in which the learning rate rises.
    clip_grad
        Largest norm of the gradient; default: no limit.
    accumulate
        Compute each step in so many parts, to save memory; the result is the same.
    decoder_dim
        Width of the decoder; default: what goes with the model, as for the next two.
    decoder_depth
        Blocks of the decoder.
    decoder_heads
        Attention heads of the decoder.
    init
        Continue from the encoder of this run directory, weights file or `timm:<name>[@file]`.
    precision
        `32-true`, `bf16-mixed`, or `auto`: bf16-mixed on CUDA, else 32-true.
    device
        `auto` takes CUDA, else MPS, else the CPU.
    devices
        How many of them; under torchrun or SLURM their count is taken from there.
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
        The loss became NaN or infinite; the last good checkpoint is kept.
    Stopped
        On SIGTERM, SIGUSR1 or at `max_minutes`, after a checkpoint.
    """
    fabric = make_fabric(device, devices, precision)
    if target not in TARGETS or (target == "token" and tokenizer is None):
        make_target(target, TargetOptions(patch_size=1, mean=(), std=()))  # raises, before any data is opened
    tokens = load_tokenizer(tokenizer) if target == "token" and tokenizer is not None else None
    source = open_source(data, options if tokens is None else tokens.fill_options(options))
    view = source.view
    side = _patch_size(patch_size, tokens, view)
    wanted = make_target(
        target,
        TargetOptions(
            patch_size=side,
            mean=view.mean,
            std=view.std,
            tokenizer=tokens,
            label_smoothing=label_smoothing,
            norm_pix=norm_pix,
        ),
    )
    if "labels" in wanted.requires:
        require_labels(source, f"The tokenizer {tokenizer}")
    config = PretrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        base_lr=wanted.base_lr if lr is None else lr,
        mask_ratio=mask_ratio,
        weight_decay=weight_decay,
        warmup=warmup,
        clip_grad=clip_grad,
        accumulate=accumulate,
        seed=seed,
        log_every=log_every,
        checkpoint_every=parse_interval(checkpoint_every),
        compile=compile,
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
        decoder_dim=decoder_dim,
        decoder_depth=decoder_depth,
        decoder_heads=decoder_heads,
    )
    if init is not None:
        continue_from(built, init)
    hidden_count(built.num_patches, mask_ratio)
    _check_batch(source, config, fabric.world_size)

    settings = {
        "data": str(data) if isinstance(data, str | Path) else source.name,
        "target": target,
        "tokenizer": str(tokenizer) if isinstance(tokenizer, str | Path) else None,
        "model": model,
        "patch_size": side,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": config.base_lr,
        "mask_ratio": mask_ratio,
        "norm_pix": norm_pix,
        "label_smoothing": label_smoothing,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "clip_grad": clip_grad,
        "accumulate": accumulate,
        "decoder_dim": decoder_dim,
        "decoder_depth": decoder_depth,
        "decoder_heads": decoder_heads,
        "init": init,
        "precision": str(fabric.strategy.precision.precision),
        "device": device,
        "devices": devices,
        "workers": workers,
        "resident": resident,
        "compile": compile,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
        "seed": seed,
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
        "tokenizer_fingerprint": None if tokens is None else tokens.fingerprint(),
        "norm_pix": norm_pix if target == "pixel" else None,
    }
    fabric.launch()
    if message := source.skipped_message() if fabric.is_global_zero else None:
        Console(stderr=True).print(message, markup=False, highlight=False)
    with memory_advice(batch_size):
        if dry_run:
            figures = estimate(fabric, built, wanted, _loader(source, view, config, fabric, workers, resident), config)
            return PretrainResult(out=None, model=recipe, figures=figures)
        plain = {key: value for key, value in settings.items() if value is not None}
        run = RunDirectory(out, KIND, plain, resume=resume, volatile=_VOLATILE)
        return _run(fabric, built, wanted, (source, view), config, run, facts, (workers, resident, max_minutes))


def _run(
    fabric: Fabric,
    model: MaskedImageModel,
    target: Target,
    images: tuple[ImageSource, ViewConfig],
    config: PretrainConfig,
    run: RunDirectory,
    facts: Mapping[str, Any],
    limits: tuple[int | None, bool | None, float | None],
) -> PretrainResult:
    """Train inside the run directory, then write what is to be kept."""
    workers, resident, max_minutes = limits
    with enter_on_first(fabric, run) as held, listen_for_stop(max_minutes) as stop:
        if fabric.broadcast(run.finished):
            return PretrainResult(out=run.path, model=facts["model"], figures=run.manifest.get("result", {}))
        if held is not None:
            _check_same_inputs(held, facts)
            held.write_manifest(facts)
        checkpoints = Checkpoints(run.path / "checkpoints", warn=_warn if held is not None else lambda message: None)
        loader = _loader(*images, config, fabric, workers, resident)
        row = train(fabric, model, target, loader, config, held, checkpoints, stop)
        if held is not None:
            save_weights(model, run.path)
            held.finish({"result": row})
        fabric.barrier()
    return PretrainResult(out=run.path, model=facts["model"], figures=row)


def _patch_size(asked: int | None, tokenizer: Tokenizer | None, view: ViewConfig) -> int:
    """The patch side: the tokenizer's, or what was asked for; checked against the image."""
    if tokenizer is not None:
        tokenizer.check_matches(view, asked)
        asked = tokenizer.patch_size
    if asked is None:
        height, width = view.image_size
        sides = [p for p in range(1, min(height, width)) if height % p == 0 and width % p == 0]
        raise InputError(
            f"--patch-size is needed where there is no tokenizer to take it from. For images of {height}x{width} "
            f"pixels it can be {', '.join(map(str, sides))}."
        )
    view.check_patch_size(asked)
    return asked


def _check_batch(source: ImageSource, config: PretrainConfig, processes: int) -> None:
    """Refuse a batch that cannot be filled or divided."""
    parts = processes * config.accumulate
    config.part_size(processes)
    if len(source) < config.batch_size:
        fits = len(source) // parts * parts
        advice = f"Use --batch-size {fits} or less" if fits else f"Use at most {len(source)} parts"
        raise InputError(
            f"{source.name} ({source.split}) has {len(source)} images, fewer than one step takes "
            f"(--batch-size {config.batch_size}). {advice}."
        )


def _check_same_inputs(run: RunDirectory, facts: Mapping[str, Any]) -> None:
    """A run may only be continued on the images and the tokenizer that it was started with."""
    for key, what in (("data_fingerprint", "--data"), ("tokenizer_fingerprint", "--tokenizer")):
        before = run.manifest.get(key, facts[key])
        if before != facts[key]:
            raise InputError(
                f"--resume: {what} is not what {run.path} was started with: its contents have changed since. "
                "Restore them, or choose another --out."
            )


def _loader(
    source: ImageSource,
    view: ViewConfig,
    config: PretrainConfig,
    fabric: Fabric,
    workers: int | None,
    resident: bool | None,
) -> Loader:
    return make_loader(
        source,
        view,
        batch_size=config.part_size(fabric.world_size),
        train=True,
        seed=config.seed,
        device=fabric.device,
        workers=workers,
        resident=resident,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )


def _warn(message: str) -> None:
    Console(stderr=True).print(f"Warning: {message}", markup=False, highlight=False)
