"""`clustermim finetune`: train an encoder and a classifier together on labelled images, and judge the two."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import timm
from cyclopts import Parameter
from lightning_fabric import Fabric
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from clustermim.data.loaders import make_loader
from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.sources import ImageSource, open_splits
from clustermim.data.views import ViewConfig
from clustermim.encoders.contract import Encoder
from clustermim.encoders.opening import open_encoder
from clustermim.encoders.timm_encoder import TimmEncoder
from clustermim.errors import InputError
from clustermim.evaluation.augmenting import RandAugment
from clustermim.evaluation.cache import fingerprint
from clustermim.evaluation.classifier import Classifier, layered_groups, set_drop_path
from clustermim.evaluation.evaluating import view_for
from clustermim.evaluation.finetune import Bundle, FinetuneConfig, finetune_loop, logits_of
from clustermim.evaluation.judging import classification
from clustermim.evaluation.sealing import Sealed
from clustermim.runs import RunDirectory, atomic_save, atomic_write, read_manifest
from clustermim.training.checkpoints import Checkpoints, parse_interval
from clustermim.training.launch import Device, Precision, enter_on_first, listen_for_stop, make_fabric
from clustermim.training.trouble import advice, resumable

KIND = "finetune"
_VOLATILE = ("device", "devices", "workers", "resident", "checkpoint_every", "log_every")


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """How good the fine-tuned classifier is, and where it is.

    Attributes
    ----------
    out
        The run directory: `encoder.safetensors` (probe takes it again) and `classifier.safetensors`.
    records
        A row for the last weights and one for their moving average, with the columns of `probe`.
    """

    out: Path
    records: list[dict[str, Any]]

    def rows(self) -> list[dict[str, Any]]:
        """Flat records; accuracies are in [0, 1]."""
        return self.records

    def __rich__(self) -> Table:
        """Top-1 with interval, top-5, balanced accuracy."""
        first = self.records[0]
        title = f"{first['encoder']} fine-tuned on {first['data']}, {first['n_test']:,} test images: {self.out}"
        table = Table(title=title, title_justify="left")
        shown = {"top1": "top-1", "top5": "top-5", "balanced": "balanced accuracy"}
        held = [key for key in shown if key in first]
        for name in ("weights", *(shown[key] for key in held), "95 % interval of top-1"):
            table.add_column(name, justify="left" if name == "weights" else "right")
        for row in self.records:
            cells = [f"{100 * row[key]:.1f}" for key in held]
            table.add_row(row["weights"], *cells, f"{100 * row['top1_low']:.1f} to {100 * row['top1_high']:.1f}")
        return table


def finetune(
    encoder: Annotated[Any, Parameter()],
    data: Annotated[Any, Parameter()] = "digits",
    *,
    out: Path,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 5e-4,
    pool: Literal["mean", "cls"] | None = None,
    layer_decay: float = 0.75,
    drop_path: float = 0.1,
    randaugment: str = "rand-m9-mstd0.5-inc1",
    mixup: float = 0.8,
    cutmix: float = 1.0,
    label_smoothing: float = 0.1,
    ema: float = 0.9999,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    clip_grad: float | None = None,
    precision: Precision = "auto",
    device: Device = "auto",
    devices: int = 1,
    workers: int | None = None,
    resident: bool | None = None,
    checkpoint_every: str = "500",
    log_every: int = 20,
    max_minutes: float | None = None,
    seed: int = 0,
    resume: bool = False,
    json: Path | None = None,
    options: Annotated[DataOptions, Parameter(name="*")] = DEFAULTS,
) -> FinetuneResult:
    """Train an encoder and a classifier together on labelled images, and judge the two on the test split.

    Nothing is chosen by the test images: they are judged once, after the last step, by the last weights and by their
    moving average.

    Parameters
    ----------
    encoder
        A run directory, timm:NAME[@FILE], or random:MODEL for training from scratch.
    data
        Labelled images with a test split, or one is held out.
    out
        Run directory to make.
    epochs
        Passes over the training images.
    batch_size
        Images a step, over all devices.
    lr
        Learning rate of the topmost layer for 256 images a step.
    pool
        What the classifier reads: `mean` of the patches (default, where there are patches) or `cls`.
    layer_decay
        Factor of the learning rate from one layer to the next below; .65 is usual for a ViT-B.
    drop_path
        Share of the last block's residual branches that are dropped.
    randaugment
        Policy as timm writes it, or `none`.
    mixup
        Parameter of its beta distribution; 0 for none.
    cutmix
        Parameter of its beta distribution; 0 for none.
    label_smoothing
        Share of each target that is spread over all classes.
    ema
        Decay of the moving average of the weights; 0 for none.
    weight_decay
        Of the weight matrices.
    warmup
        Share of the training in which the learning rate rises.
    clip_grad
        Largest norm of the gradient; default: no limit.
    precision
        `32-true`, `bf16-mixed`, or `auto`: bf16-mixed on CUDA, else 32-true.
    device
        `auto` takes CUDA, else MPS, else the CPU.
    devices
        How many of them; under torchrun or SLURM their count is taken from there.
    workers
        Processes that read and augment images; default: as many as help.
    resident
        Keep all images in the device's memory; default: if they fit.
    checkpoint_every
        Steps (`500`) or time (`10m`) between checkpoints; the last two are kept.
    log_every
        Steps between rows of metrics.jsonl.
    max_minutes
        Stop after so many minutes with a checkpoint and exit code 75; --resume continues exactly.
    seed
        Of the classifier, the order, the views, RandAugment, mixing and drop path.
    resume
        Start, continue exactly, or do nothing if OUT is finished.
    json
        Also write the table's rows to this file.
    options
        How images are read and viewed.

    Returns
    -------
    FinetuneResult
        Where the weights are, and how good they are.

    Raises
    ------
    InputError
        Something does not fit; found before any training.
    NonFiniteLossError
        The loss became NaN or infinite; the last good checkpoint is kept.
    Stopped
        On SIGTERM, SIGUSR1 or at `max_minutes`, after a checkpoint.
    """
    if json is not None and json.is_dir():
        raise InputError(f"--json {json} is a folder; name a file to write to.")
    config = FinetuneConfig(
        epochs=epochs,
        batch_size=batch_size,
        base_lr=lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        drop_path=drop_path,
        mixup=mixup,
        cutmix=cutmix,
        smoothing=label_smoothing,
        ema=ema,
        warmup=warmup,
        clip_grad=clip_grad,
        seed=seed,
        log_every=log_every,
        checkpoint_every=parse_interval(checkpoint_every),
    )
    fabric = make_fabric(device, devices, precision)
    train, test = open_splits(data, options)
    sealed = Sealed(train, test)
    opened = open_encoder(encoder, view=train.view)
    before = fingerprint(opened)
    view = view_for(opened, train.view)
    recipe = _recipe(encoder, opened)
    classifier = Classifier(opened, sealed.num_classes, pool, seed)
    layered_groups(classifier, weight_decay, layer_decay)
    if drop_path > 0 and not set_drop_path(classifier.encoder, drop_path):
        raise InputError(f"--drop-path {drop_path:g}: {opened.name} has no branches to drop. Use --drop-path 0.")
    augment = None
    if randaugment != "none":
        augment = RandAugment(randaugment, channels=view.channels, mean=view.mean, seed=seed)
    if batch_size % fabric.world_size:
        raise InputError(f"--batch-size {batch_size} cannot be divided over {fabric.world_size} processes.")
    if len(train) < batch_size:
        raise InputError(
            f"{train.name} (train) has {len(train)} images, fewer than one step takes (--batch-size {batch_size}). Use "
            f"--batch-size {len(train)} or less."
        )
    settings = {
        "encoder": str(encoder) if isinstance(encoder, str | Path) else opened.name,
        "data": str(data) if isinstance(data, str | Path) else train.name,
        **{key: value for key, value in asdict(config).items() if key not in ("base_lr", "smoothing")},
        "lr": lr,
        "label_smoothing": label_smoothing,
        "pool": classifier.pool,
        "randaugment": randaugment,
        "precision": str(fabric.strategy.precision.precision),
        "checkpoint_every": checkpoint_every,
        "device": device,
        "devices": devices,
        "workers": workers,
        "resident": resident,
        **asdict(options),
        **{key: getattr(view, key) for key in ("image_size", "channels", "mean", "std", "flip", "crop_scale")},
    }
    mean, std = _statistics(opened)
    facts = {
        "encoder": settings["encoder"],
        "encoder_fingerprint": before,
        "pool": classifier.pool,
        "seed": seed,
        "data": {"name": train.name, "images": len(train), "classes": train.classes}
        | view.to_dict()
        | {"channels": opened.channels, "mean": mean, "std": std},
        "data_fingerprint": train.fingerprint(),
        **recipe,
    }
    fabric.launch()
    if message := train.skipped_message() if fabric.is_global_zero else None:
        Console(stderr=True).print(message, markup=False, highlight=False)
    run = RunDirectory(
        out, KIND, {k: v for k, v in settings.items() if v is not None}, resume=resume, volatile=_VOLATILE
    )
    with (
        resumable(),
        advice(batch_size, processes=fabric.world_size),
        enter_on_first(fabric, run) as held,
        listen_for_stop(max_minutes) as stop,
    ):
        if fabric.broadcast(run.finished):
            records = list(run.manifest.get("results", []))
        else:
            if held is not None:
                _check_same(held, facts)
                held.write_manifest(facts)
            bundle = Bundle(classifier, ema)
            loader = make_loader(
                train,
                view,
                batch_size=batch_size // fabric.world_size,
                train=True,
                seed=seed,
                device=fabric.device,
                workers=workers,
                resident=resident,
                rank=fabric.global_rank,
                world_size=fabric.world_size,
                augment=augment,
            )
            checkpoints = Checkpoints(run.path / "checkpoints")
            row = finetune_loop(fabric, bundle, loader, config, held, checkpoints, stop)
            records = _judge(fabric, bundle, opened.name, train, sealed, view, config, workers)
            if held is not None:
                _save(bundle, run.path, facts)
                held.finish({"result": row, "results": records})
            fabric.barrier()
    if json is not None and fabric.is_global_zero:
        atomic_write(json, dumps(records, indent=2) + "\n")
    return FinetuneResult(out=run.path, records=records)


def _judge(
    fabric: Fabric,
    bundle: Bundle,
    name: str,
    train: ImageSource,
    sealed: Sealed,
    view: ViewConfig,
    config: FinetuneConfig,
    workers: int | None,
) -> list[dict[str, Any]]:
    """Logits of all test images first, their labels then."""
    loader = make_loader(
        sealed.images,
        view,
        batch_size=config.batch_size,
        train=False,
        device=fabric.device,
        workers=workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    logits = {weights: logits_of(model, loader, fabric) for weights, model in bundle.judged().items()}
    truth = sealed.reveal(config.seed)
    facts: dict[str, Any] = {"encoder": name, "data": train.name, "protocol": KIND, "pool": bundle.classifier.pool}
    sizes = {"n_train": len(train), "n_test": len(sealed.images), "classes": sealed.num_classes, "seed": config.seed}
    rows = []
    for weights, scores in logits.items():
        found = classification(scores, truth)
        del found["confusion"]
        rows.append(facts | {"weights": weights} | found | {"epochs": config.epochs} | sizes)
    return rows


def _statistics(encoder: Encoder) -> tuple[list[float], list[float]]:
    return encoder._mean.flatten().tolist(), encoder._std.flatten().tolist()


def _recipe(spec: Any, encoder: Encoder) -> dict[str, Any]:
    """What timm rebuilds the encoder from, if it can: taken from the run it came from, or found out and tried."""
    if not isinstance(encoder, TimmEncoder):
        return {}
    if isinstance(spec, str | Path) and Path(spec).is_dir():
        return {"model": read_manifest(spec)["model"]}
    config = getattr(encoder.model, "pretrained_cfg", None) or {}
    name = str(config.get("architecture"))
    kwargs: dict[str, Any] = {"in_chans": encoder.channels}
    size = getattr(getattr(encoder.model, "patch_embed", None), "img_size", None)
    if size is not None:
        kwargs["img_size"] = list(size)
    try:
        again = timm.create_model(name, **kwargs, num_classes=0)
    except Exception:  # whatever timm raises: it cannot be rebuilt so
        return {}
    shapes = {key: value.shape for key, value in again.state_dict().items()}
    same = shapes == {key: value.shape for key, value in encoder.model.state_dict().items()}
    return {"model": {"name": name, "kwargs": kwargs}} if same else {}


def _save(bundle: Bundle, folder: Path, facts: Mapping[str, Any]) -> None:
    """The averaged weights where there are some, else the last: the encoder alone, and with the classifier."""
    model: Any = bundle.judged().get("ema", bundle.classifier)
    inner: nn.Module = model.encoder.model if isinstance(model.encoder, TimmEncoder) else model.encoder
    body = {key: value.detach().cpu().contiguous() for key, value in inner.state_dict().items()}
    head = {f"head.{key}": value.detach().cpu().contiguous() for key, value in model.head.state_dict().items()}
    files = {"classifier.safetensors": body | head}
    if "model" in facts:
        files["encoder.safetensors"] = body
    for name, tensors in files.items():
        atomic_save(
            folder / name,
            lambda path, tensors=tensors: safetensors.torch.save_file(tensors, path, metadata={"format": "pt"}),  # type: ignore[misc]
        )
    if "model" in facts and isinstance(inner, VisionTransformer):
        pooling = {"global_pool": "avg" if model.pool == "mean" else "token", "fc_norm": False}
        kwargs = facts["model"]["kwargs"] | pooling | {"num_classes": model.head.out_features}
        text = dumps({"name": facts["model"]["name"], "kwargs": kwargs, "classes": facts["data"]["classes"]}, indent=1)
        atomic_write(folder / "classifier.json", text)


def _check_same(run: RunDirectory, facts: Mapping[str, Any]) -> None:
    """A run may only be continued on the images and from the encoder that it was started with."""
    for key, what in (("data_fingerprint", "--data"), ("encoder_fingerprint", "--encoder")):
        if run.manifest.get(key, facts[key]) != facts[key]:
            raise InputError(
                f"--resume: {what} is not what {run.path} was started with: its contents have changed since. Restore "
                f"them, or choose another --out."
            )
