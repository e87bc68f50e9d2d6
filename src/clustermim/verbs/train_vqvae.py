"""`clustermim tokenizer fit --kind vqvae`: the part of the verb that trains, inside its run directory."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from clustermim.data.sources import ImageSource
from clustermim.errors import InputError
from clustermim.runs import RunDirectory
from clustermim.tokenizers.fitting import provenance
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer
from clustermim.tokenizers.vqvae.fitting import check, fit_vqvae
from clustermim.tokenizers.vqvae.training import VQVAEConfig
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import Device, enter_on_first, listen_for_stop, make_fabric
from clustermim.training.trouble import advice, resumable

# Of no influence on the codes, up to rounding; --max-minutes is not even noted.
_VOLATILE = ("device", "devices", "workers", "checkpoint_every", "log_every", "max_minutes")


def train_into(
    out: Path,
    source: ImageSource,
    settings: Mapping[str, Any],
    *,
    patch_size: int,
    k: int,
    seed: int,
    batch_size: int,
    config: VQVAEConfig,
    device: Device,
    devices: int = 1,
    workers: int | None = None,
    resume: bool = False,
) -> Tokenizer:
    """Train a VQ-VAE tokenizer into a run directory: rows of metrics, checkpoints, exact resumption.

    Parameters
    ----------
    out
        The run directory.
    source
        Images.
    settings
        The verb's options for `config.yaml`.
    patch_size, k, seed, batch_size, config, workers
        As for `fit_vqvae`.
    device, devices
        As for `make_fabric`.
    resume
        Start, continue exactly, or load what is finished.

    Raises
    ------
    InputError
        Something does not fit; found before any training, and `out` is then as it was.
    NonFiniteLossError
        The loss became NaN or infinite; the last good checkpoint is kept.
    Stopped
        On SIGTERM, SIGUSR1 or at `max_minutes`, after a checkpoint.
    """
    fabric = make_fabric(device, devices, config.precision)
    check(source, patch_size=patch_size, k=k, batch_size=batch_size, processes=fabric.world_size)
    fabric.launch()
    noted = dict(settings) | {"precision": str(fabric.strategy.precision.precision)}
    run = RunDirectory(out, "tokenizer fit", noted, resume=resume, volatile=_VOLATILE)
    facts = provenance(source, seed)
    with (
        resumable(),
        advice(batch_size, processes=fabric.world_size),
        _left_as_it_was(run),
        enter_on_first(fabric, run) as held,
        listen_for_stop(config.max_minutes) as stop,
    ):
        if fabric.broadcast(run.finished):
            return load_tokenizer(run.path)
        if held is not None:
            _check_same_images(held, facts)
            held.write_manifest({"data": {"name": source.name}, "data_fingerprint": facts["data_fingerprint"]})
        tokenizer = fit_vqvae(
            source,
            patch_size=patch_size,
            k=k,
            seed=seed,
            batch_size=batch_size,
            config=config,
            fabric=fabric,
            workers=workers,
            facts=facts,
            run=held,
            checkpoints=Checkpoints(run.path / "checkpoints", warn=_warn if held is not None else lambda message: None),
            stop=stop,
        )
        if held is not None:
            tokenizer.save_pretrained(run.path)
            held.finish({"tokenizer": tokenizer.fingerprint(), "seed": seed, "result": tokenizer.rows()[0]})
        fabric.barrier()
    return tokenizer


@contextlib.contextmanager
def _left_as_it_was(run: RunDirectory) -> Iterator[None]:
    """An input error found late takes the run's notes with it: the corrected command may use the same folder."""
    was_there = run.path.exists()
    noted = (run.path / "config.yaml").exists()
    try:
        yield
    except InputError:
        if not noted:
            for name in ("config.yaml", "manifest.json", "metrics.jsonl"):
                (run.path / name).unlink(missing_ok=True)
            if not was_there:
                with contextlib.suppress(OSError):
                    run.path.rmdir()
        raise


def _check_same_images(run: RunDirectory, facts: Mapping[str, Any]) -> None:
    before = run.manifest.get("data_fingerprint", facts["data_fingerprint"])
    if before != facts["data_fingerprint"]:
        raise InputError(
            f"--resume: --data is not what {run.path} was started with: its contents have changed since. Restore "
            "them, or choose another --out."
        )


def _warn(message: str) -> None:
    Console(stderr=True).print(f"Warning: {message}", markup=False, highlight=False)
