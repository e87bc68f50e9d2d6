"""`clustermim tokenizer fit`: a tokenizer from images."""

import contextlib
import inspect
import json as jsonlib
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from lightning_fabric import Fabric
from rich.console import Console

from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.sources import ImageSource, open_source
from clustermim.data.streaming.opening import open_images
from clustermim.data.streaming.source import AnySource
from clustermim.encoders.presets import default_patch_size
from clustermim.errors import InputError
from clustermim.features.patches import PatchFeatures
from clustermim.runs import RunDirectory, atomic_write
from clustermim.tokenizers.fitting import fit
from clustermim.tokenizers.kmeans import MAX_PASSES, TOL
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer
from clustermim.tokenizers.vqvae.training import VQVAEConfig
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import Device, enter_on_first, exact_fabric, listen_for_stop
from clustermim.training.trouble import resumable
from clustermim.verbs.align_tokens import fit_aligned, gain_sentence, plan_alignment
from clustermim.verbs.train_vqvae import train_into

Kind = Literal["kmeans", "vqvae", "identity", "random", "random-centroids", "position", "oracle"]

_KIND = "tokenizer fit"
_VOLATILE = ("device", "devices", "workers", "batch_size")  # of no influence on the tokens


def fit_tokenizer(
    data: Annotated[Any, Parameter()] = "digits",
    features: Annotated[Any, Parameter()] = "pixel",
    k: int = 50,
    *,
    patch_size: int | None = None,
    out: Annotated[Path | None, Parameter(required=True)] = None,
    kind: Kind = "kmeans",
    metric: Literal["l2", "cosine"] = "l2",
    seed: int = 0,
    n_init: int | None = None,
    max_passes: int = MAX_PASSES,
    tol: float = TOL,
    fit_views: Literal["eval", "train"] = "eval",
    align_with: Literal["labels"] | None = None,
    align_from: int | None = None,
    align_images: int | None = None,
    levels: Literal[1, 2] | None = None,
    probes: int | None = None,
    batch_size: int = 256,
    device: Device = "auto",
    devices: int = 1,
    workers: int | None = None,
    resume: bool = False,
    json: Path | None = None,
    vqvae: Annotated[VQVAEConfig | None, Parameter(name="*", group="Only for --kind vqvae")] = None,
    options: Annotated[DataOptions, Parameter(name="*")] = DEFAULTS,
) -> Tokenizer:
    """Fit a tokenizer to images: cluster their patches by K-means, train a VQ-VAE, or make a control.

    Parameters
    ----------
    data
        Images: digits, a folder, .zip, .npz, .tif or parquet; in Python also an array or a Dataset. The train split,
        unless #test or #all says otherwise. K-means also reads streams: wds:shards/train-{000..099}.tar, or hf-stream:
        and a folder of parquet or a data set of the hub.
    features
        What a patch is described by: pixel[?standardise=true&context=12&whiten=true], hog[?orientations=9&cell=8],
        backbone:NAME[@FILE][?layer=9&size=224&dtype=bf16] with a timm NAME, or run:DIR[?layer=6], the encoder of an
        earlier pretraining; several are joined by +, and |pca=64[&whiten=true] behind them keeps principal components.
    k
        Vocabulary: the number of tokens.
    patch_size
        Patch side in pixels. Default: about an eighth of the short side, from 2 to 16.
    out
        Folder for the tokenizer; must be new or empty.
    kind
        kmeans; vqvae, a learned tokenizer with options of its own; or a control that brackets them: identity (each
        patch its own token), random, random-centroids, position, oracle (the label).
    metric
        l2, or cosine for spherical K-means on unit features.
    seed
        Decides the starts of K-means and the draws of the controls.
    n_init
        Starts of K-means that are compared on a small sample. Default: 4 up to k = 256, else 1.
    max_passes
        At most so many passes over all patches, on one level.
    tol
        Stop when a pass over all patches lowers the inertia by less than this share.
    fit_views
        Which view of each image is clustered: eval (the whole image), or train (one random crop and flip of each, the
        same in every pass), since crops are what the tokenizer meets in pretraining.
    align_with
        labels: cluster into more tokens and merge them down to k so that they line up with classes; the gain over plain
        K-means of k tokens is measured on labelled images that took no part.
    align_from
        Tokens before merging. Default: 20 times k, at most 2,000 or 4 times k.
    align_images
        Labelled images to merge by; the others judge. Default: half of them.
    levels
        1 compares a patch with all centroids; 2 parts them into about √k cells and searches the nearest few. Default:
        2 for kmeans from k = 8193 on. The table that is printed says which it was.
    probes
        Cells searched for each patch, on two levels: more are slower and nearer to a full search. Default: 4.
    batch_size
        Images described at once; the result does not depend on it. For vqvae the images of a training step, at most
        all of them.
    device
        cpu, cuda or mps; auto takes the best there is.
    devices
        How many of them, a process each, which share the images out among them; under torchrun or SLURM their count is
        taken from there. The tokens are those of one process.
    workers
        Processes that read images. Default: none where the images fit in memory, else one a core.
    resume
        Into a folder where a fit was broken off: continue it exactly; where it was finished: load it.
    json
        Also write the table to this file.
    vqvae
        How a VQ-VAE is trained.
    options
        How the images are read.

    Returns
    -------
    Tokenizer
        On the CPU.

    Raises
    ------
    InputError
        The data, the features or the options cannot be used; or `out` holds something else.
    NonFiniteLossError
        For vqvae, as for `pretrain`.
    Stopped
        On SIGTERM or SIGUSR1, where `out` is given: `resume` continues.
    """
    only_clustered = {"metric": metric, "n_init": n_init, "max_passes": max_passes, "tol": tol, "fit_views": fit_views}
    only_clustered |= {"levels": levels, "probes": probes}
    _refuse_inapplicable(kind, vqvae, features=features, **only_clustered)
    fabric = exact_fabric(device, devices)
    if kind != "vqvae":  # which launches its own, of another precision
        fabric.launch()
    where = fabric.device
    in_any_order = align_with is not None or kind in ("vqvae", "oracle")
    source = open_source(data, options) if in_any_order else open_images(data, options)
    if message := source.skipped_message() if fabric.is_global_zero else None:
        Console(stderr=True).print(message, markup=False, highlight=False)
    side = default_patch_size(source.view.image_size) if patch_size is None else patch_size
    source.view.check_patch_size(side)
    fitted: dict[str, Any] = {
        "k": k,
        "patch_size": side,
        "kind": kind,
        "metric": metric,
        "seed": seed,
        "n_init": n_init,
        "max_passes": max_passes,
        "tol": tol,
        "fit_views": fit_views,
        "levels": levels,
        "probes": probes,
        "batch_size": batch_size,
        "workers": workers,
    }
    common: dict[str, Any] = {"features": features, "device": where, "progress": True, "fabric": fabric}
    make: Callable[..., Tokenizer] = partial(fit, source, **common, **fitted)
    if align_with is not None:
        if levels == 2 or probes is not None:
            raise InputError("--align-with labels merges tokens of one level; leave --levels and --probes out.")
        fitted["levels"] = 1
        assert isinstance(source, ImageSource)  # in_any_order
        plan = plan_alignment(source, k, fine=align_from, images=align_images, kind=kind, seed=seed)
        make = partial(fit_aligned, source, plan, **common, **fitted)
        fitted |= {"align_with": align_with, "align_from": align_from, "align_images": align_images}
    elif align_from is not None or align_images is not None:
        raise InputError("--align-from and --align-images say how to align: add --align-with labels.")
    if kind == "vqvae":
        how = vqvae or VQVAEConfig()
        if out is None and how.max_minutes is not None:
            raise InputError("max_minutes needs out: a training that is stopped leaves a checkpoint there.")
        sizes: dict[str, Any] = {"patch_size": side, "k": k, "seed": seed, "batch_size": batch_size, "workers": workers}
        if out is None:
            tokenizer = fit(source, kind=kind, device=where, vqvae=how, **sizes)
        else:
            assert isinstance(source, ImageSource)  # in_any_order
            settings = {
                "data": source.name,
                "kind": kind,
                **sizes,
                "device": device,
                "devices": devices,
                **asdict(how),
                **options.given(),
            }
            settings = {key: value for key, value in settings.items() if value is not None}
            tokenizer = train_into(
                out, source, settings, config=how, device=device, devices=devices, resume=resume, **sizes
            )
    elif out is None:
        tokenizer = make()
    else:
        spec = features.spec if isinstance(features, PatchFeatures) else features
        config = {
            "data": source.name,
            "features": spec,
            **fitted,
            "device": device,
            "devices": devices,
            **options.given(),
        }
        config = {key: value for key, value in config.items() if value is not None}
        run = RunDirectory(out, _KIND, config, resume=resume, volatile=_VOLATILE)
        tokenizer = _fit_into(fabric, run, source, make)
    if (message := gain_sentence(tokenizer)) and fabric.is_global_zero:
        Console(stderr=True).print(message, markup=False, highlight=False)
    if json is not None and fabric.is_global_zero:
        atomic_write(json, jsonlib.dumps(tokenizer.rows(), indent=1))
    return tokenizer


def _refuse_inapplicable(kind: str, vqvae: VQVAEConfig | None, **others: Any) -> None:
    """Options of one kind that are given to another are an error: ignored, they would mislead."""
    if kind != "vqvae" and vqvae is not None:
        changed = [key for key, value in asdict(vqvae).items() if value != getattr(VQVAEConfig(), key)]
        named = ", ".join(f"--{key.replace('_', '-')}" for key in changed) or "An option such as --epochs"
        raise InputError(f"{named}: only for --kind vqvae, not for {kind}. Leave it out, or choose that kind.")
    defaults = {name: parameter.default for name, parameter in inspect.signature(fit_tokenizer).parameters.items()}
    unfit = [f"--{key.replace('_', '-')}" for key, value in others.items() if value != defaults[key]]
    if kind == "vqvae" and unfit:
        raise InputError(f"{', '.join(unfit)}: not for --kind vqvae, which learns from pixels. Leave it out.")


def _fit_into(fabric: Fabric, run: RunDirectory, source: AnySource, make: Callable[..., Tokenizer]) -> Tokenizer:
    """Fit and save. A fit that fails takes its notes with it, so that the corrected command may use the same folder."""
    was_there = run.path.exists()
    forget = False
    try:
        with resumable(), enter_on_first(fabric, run) as held, listen_for_stop() as stop:
            if fabric.broadcast(run.finished):
                return load_tokenizer(run.path)
            checkpoints = Checkpoints(run.path / "checkpoints", warn=_warn)
            if held is not None:
                _check_same_data(held, source)
            try:
                tokenizer = make(checkpoints=checkpoints, stop=stop)
            except InputError:
                forget = held is not None and not run.resuming
                for name in ("config.yaml", "manifest.json") if forget else ():
                    (run.path / name).unlink(missing_ok=True)
                if forget:
                    shutil.rmtree(checkpoints.folder, ignore_errors=True)
                raise
            if held is not None:
                tokenizer.save_pretrained(run.path)
                facts = {"tokenizer": tokenizer.fingerprint(), "seed": run.config["seed"]}
                run.finish(facts | {"data": {"name": source.name}, "result": tokenizer.rows()[0]})
                shutil.rmtree(checkpoints.folder, ignore_errors=True)
            fabric.barrier()
            return tokenizer
    finally:
        if forget and not was_there:
            with contextlib.suppress(OSError):
                run.path.rmdir()


def _check_same_data(run: RunDirectory, source: AnySource) -> None:
    """A fit may only be continued on the images with which it was begun."""
    now = source.fingerprint()
    if run.manifest.get("data_fingerprint", now) != now:
        raise InputError(
            f"--resume: --data is not what {run.path} was started with: its contents have changed since. "
            "Restore them, or choose another --out."
        )
    run.write_manifest({"data_fingerprint": now})


def _warn(message: str) -> None:
    Console(stderr=True).print(f"Warning: {message}", markup=False, highlight=False)
