"""What `clustermim pretrain` does once everything fits: train inside the run directory, keep what is to be kept."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clustermim.data.loaders import Loader, make_loader
from clustermim.data.streaming.source import AnySource
from clustermim.data.views import ViewConfig
from clustermim.errors import InputError, NonFiniteLossError
from clustermim.mim.contract import MaskedModel
from clustermim.mim.pretraining import PretrainConfig, train
from clustermim.mim.starting import ENCODER_FILE, save_weights
from clustermim.mim.targets import Target
from clustermim.mim.watching import Watchers
from clustermim.runs import RunDirectory
from clustermim.tokenizers.tokenizer import Tokenizer
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import Strategy, by_the_first, enter_on_first, listen_for_stop
from clustermim.training.progress import duration
from clustermim.training.sharding import whole
from clustermim.training.trouble import advice, resumable
from clustermim.verbs.pretrain_watch import WatchPlan

_INPUTS = (
    ("data_fingerprint", "--data"),
    ("tokenizer_fingerprint", "--tokenizer"),
    ("features_fingerprint", "--features"),
)


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


def carry_out(
    fabric: Fabric,
    model: MaskedModel,
    target: Target,
    images: tuple[AnySource, ViewConfig],
    config: PretrainConfig,
    run: RunDirectory,
    facts: Mapping[str, Any],
    limits: tuple[int | None, bool | None, float | None],
    watch: WatchPlan,
) -> PretrainResult:
    """Train inside the run directory, then write what is to be kept."""
    workers, resident, max_minutes = limits
    parts = {"accumulate": config.accumulate, "processes": fabric.world_size}
    with (
        resumable(lr=f"{config.base_lr / 2:g}"),
        enter_on_first(fabric, run) as held,
        listen_for_stop(max_minutes) as stop,
        advice(config.batch_size, **parts),
    ):
        if fabric.broadcast(run.finished):
            return PretrainResult(out=run.path, model=facts["model"], figures=run.manifest.get("result", {}))
        by_the_first(fabric, _begin, held, facts)
        checkpoints = Checkpoints(run.path / "checkpoints", warn=_warn if held is not None else lambda message: None)
        loader = training_loader(*images, config, fabric, workers, resident)
        try:
            looks = [] if held is None else watch.looks(model, config, run.path, fabric.device, workers, resident)
            with Watchers(fabric, held, watch.options.log, watch.every, looks) as watchers:
                row = train(fabric, model, target, loader, config, held, checkpoints, stop, watchers) | watchers.figures
        except NonFiniteLossError:
            if held is not None:
                held.note_divergence()
            raise
        by_the_first(fabric, _finish, held, whole(model.state_dict()), row)
    return PretrainResult(out=run.path, model=facts["model"], figures=row)


def check_strategy(strategy: Strategy, ema: float | None, compile: bool) -> None:
    """Refuse what sharded weights cannot do here."""
    for name, given in (("ema", ema is not None), ("compile", compile)):
        if strategy == "fsdp" and given:
            raise InputError(f"--{name} cannot be used with --strategy fsdp. Leave it out, or use --strategy ddp.")


def _begin(run: RunDirectory, facts: Mapping[str, Any]) -> None:
    _check_same_inputs(run, facts)
    run.write_manifest({**facts, "status": "running"})


def _finish(run: RunDirectory, state: Mapping[str, Tensor], row: dict[str, Any]) -> None:
    save_weights(state, run.path)
    run.finish({"result": row})


def settle_patch_size(asked: int | None, tokenizer: Tokenizer | None, view: ViewConfig) -> int:
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


def check_batch(source: AnySource, config: PretrainConfig, processes: int) -> None:
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
    for key, what in _INPUTS:
        before = run.manifest.get(key, facts[key])
        if before != facts[key]:
            raise InputError(
                f"--resume: {what} is not what {run.path} was started with: its contents have changed since. "
                "Restore them, or choose another --out."
            )


def tokenizer_from_run(run: Path, tokenizer: Any) -> str | None:
    """The way from a run directory to its tokenizer's folder, which holds where both are moved; None if it is none."""
    if not isinstance(tokenizer, str | Path) or not Path(tokenizer).is_dir():
        return None
    return Path(os.path.relpath(Path(tokenizer).resolve(), run.resolve())).as_posix()


def training_loader(
    source: AnySource,
    view: ViewConfig,
    config: PretrainConfig,
    fabric: Fabric,
    workers: int | None,
    resident: bool | None,
) -> Loader:
    """The loader of train views of this process."""
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
