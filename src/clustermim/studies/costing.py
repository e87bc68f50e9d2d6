"""What a plan costs before it is begun: time from a few real steps and counted operations, and room on the disk.

Time is a rough guide. The speed of this machine is measured on the largest training of the plan of which a few steps
take about a second, and for K-means, which is products only, on a product; everything else is scaled by its number of
operations, so that a plan for a large GPU can be looked at on a laptop.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from clustermim.data.views import ViewConfig
from clustermim.encoders.presets import decoder_defaults, model_kwargs
from clustermim.errors import InputError
from clustermim.studies.folder import SETTLED, StudyFolder
from clustermim.studies.opening import Sources
from clustermim.studies.pieces import Cell, Piece, Plan
from clustermim.studies.states import states_of
from clustermim.tokenizers.vqvae.network import Decoder, Encoder
from clustermim.tokenizers.vqvae.training import VQVAEConfig
from clustermim.training.launch import Device, resolve_device, trains_in
from clustermim.verbs.pretrain_encoder import pretrain

_MEASURED_STEP = 4e10  # operations of a measured step: about a second on two cores
_MEASURED_BATCH = 32  # images of a measured step, at least, or a training of fewer operations is measured
_PRODUCT = (4096, 256, 1024)  # patches, numbers, centroids of a measured product, which is done eight times
_SCORED_A_SECOND = 500.0  # images that are scored in a second: read, tokenized for five figures, counted
_FEATURES = 200  # numbers that describe a patch, where that is not known


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a plan.

    Attributes
    ----------
    seconds
        Of each piece, on one process.
    bytes
        What each piece leaves.
    working
        Bytes that a piece takes for a while, at most.
    rate
        Operations a second of this machine in training, measured.
    """

    seconds: Mapping[str, float]
    bytes: Mapping[str, int]
    working: int
    rate: float

    def left(self, states: Mapping[str, str]) -> float:
        """Seconds of the pieces that are not settled."""
        return sum(self.seconds[identity] for identity, state in states.items() if state not in SETTLED)


def estimate_cost(plan: Plan, sources: Sources, folder: StudyFolder, *, device: Device, threads: int) -> Cost:
    """Measure a few steps, count the rest.

    Parameters
    ----------
    plan, sources
        The study.
    folder
        Its folder; pieces that are finished there correct the guesses for their kind.
    device
        Where it will run.
    threads
        CPU threads of a process.
    """
    rate, products = _measure(plan, sources, device, threads), _measure_products(device, threads)
    cells = {identity: cell for cell in plan.cells for identity in _runs(cell)}
    seconds, left = {}, {}
    for identity, piece in plan.pieces.items():
        seconds[identity] = _seconds(piece, plan, cells, sources, rate, products)
        left[identity] = _bytes(piece, cells, sources)
    working = max((6 * left[i] for i, piece in plan.pieces.items() if piece.kind == "pretrain"), default=0)
    return Cost(seconds=_corrected(seconds, plan, folder), bytes=left, working=working, rate=rate)


def check_space(cost: Cost, folder: StudyFolder, plan: Plan, jobs: int) -> None:
    """Refuse a plan that the disk has no room for.

    Raises
    ------
    InputError
        Says how much is needed and how much there is.
    """
    parent = folder.path
    while not parent.exists():
        parent = parent.parent
    states = states_of(plan, folder)
    needed = sum(cost.bytes[i] for i, state in states.items() if state not in SETTLED) + jobs * cost.working
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(
            f"--out {folder.path}: the plan needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free "
            f"there. Free some space, choose another disk, or plan fewer cells. Nothing was written."
        )


def parameters(settings: Mapping[str, Any], image_size: tuple[int, int], channels: int) -> tuple[int, int]:
    """Parameters of a cell's encoder and decoder, without giving either any memory."""
    encoder = _encoder_parameters(settings["model"], image_size, settings["patch_size"], channels)
    if settings["encoder"] == "full":
        return encoder, 0
    decoder = decoder_defaults(settings["model"])
    depth, dim = settings.get("decoder_depth") or decoder["depth"], settings.get("decoder_dim") or decoder["dim"]
    return encoder, 12 * depth * dim**2


@cache
def _encoder_parameters(model: str, image_size: tuple[int, int], patch_size: int, channels: int) -> int:
    name, kwargs = model_kwargs(model, image_size, patch_size, channels)
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, **kwargs, num_classes=0).parameters())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _runs(cell: Cell) -> list[str]:
    return [trial.pretrain for trial in cell.trials] + [run.pretrain for run in cell.runs if run.pretrain is not None]


def _operations(cell: Cell, sources: Sources) -> float:
    """Of one image in one training step: six for each weight and each token that it is applied to."""
    view, settings = sources.train(cell.data).view, cell.settings
    encoder, decoder = parameters(settings, view.image_size, view.channels)
    tokens = (view.image_size[0] // settings["patch_size"]) * (view.image_size[1] // settings["patch_size"])
    seen = tokens if settings["encoder"] == "full" else tokens * (1 - settings["mask_ratio"]) + 1
    return float(6.0 * (encoder * seen + decoder * tokens))


def _measure(plan: Plan, sources: Sources, device: Device, threads: int) -> float:
    if not plan.cells:
        return 2e10 * threads
    by_size = sorted(((_operations(one, sources), one) for one in plan.cells), key=lambda pair: pair[0])
    quick = [pair for pair in by_size if _MEASURED_BATCH * pair[0] <= _MEASURED_STEP]
    each, cell = quick[-1] if quick else by_size[0]
    most = min(int(cell.settings["batch_size"]), len(sources.train(cell.data)))
    batch = max(1, min(most, int(_MEASURED_STEP / each)))
    plain = {key: cell.settings[key] for key in ("model", "patch_size", "mask_ratio", "mask_kind", "encoder")}
    precision = cell.settings.get("precision", "auto")
    if trains_in(precision, resolve_device(device)):  # or the plan is for another machine
        plain["precision"] = precision
    with _threads(threads):
        figures = pretrain(
            sources.entries[cell.data].source,
            out=Path(),  # a dry run writes nothing
            target="pixel",
            epochs=1,
            batch_size=batch,
            device=device,
            dry_run=True,
            options=sources.options_for(cell.data, max(batch, 256)),
            **plain,
        ).figures
    return float(figures["images_per_second"]) * each


def _measure_products(device: Device, threads: int) -> float:
    """Operations a second of a product in 32 bits, such as those that find the nearest centroids."""
    rows, numbers, columns = _PRODUCT
    with _threads(threads):
        a = torch.ones(rows, numbers, device=resolve_device(device))
        b = torch.ones(numbers, columns, device=a.device)
        found = (a @ b).sum().item()  # which waits for a GPU to be ready
        start = time.perf_counter()
        for _ in range(8):
            found += (a @ b)[0, 0].item()
        return float(8 * 2 * rows * numbers * columns / (time.perf_counter() - start))


def _autoencoder_operations(config: VQVAEConfig, patch_size: int, view: ViewConfig) -> float:
    """Of one image in one training step of a VQ-VAE: the backward pass takes twice the forward's."""
    sizes = {"channels": view.channels, "patch_size": patch_size, "width": config.width, "depth": config.depth}
    with torch.device("meta"):
        halves = Encoder(**sizes, code_dim=config.code_dim), Decoder(**sizes, code_dim=config.code_dim)
        image = torch.empty(1, view.channels, *view.image_size)
    with FlopCounterMode(display=False) as counter:
        halves[1](halves[0](image))
    return float(3 * counter.get_total_flops())


def _seconds(
    piece: Piece, plan: Plan, cells: Mapping[str, Cell], sources: Sources, rate: float, products: float
) -> float:
    train = sources.train(piece.data)
    images = len(train)
    if piece.kind == "pretrain":
        cell = cells[piece.id]
        return images * float(cell.settings["epochs"]) * _operations(cell, sources) / rate + 5.0
    if piece.kind == "fit":
        side, settings = piece.settings["patch_size"], piece.settings
        patches = images * (train.view.image_size[0] // side) * (train.view.image_size[1] // side)
        if settings.get("kind") == "vqvae":
            config = VQVAEConfig.picked(settings)
            each = _autoencoder_operations(config, side, train.view)
            return images * config.epochs_for(images) * each / rate + 5.0
        passes = 20 if settings.get("kind", "kmeans") == "kmeans" else 0
        return float(2.0 * patches * _FEATURES * settings.get("k", 50) * passes / products + images / 2000 + 1.0)
    if piece.kind == "score":
        return float(min(images, piece.settings["images"] or images) / _SCORED_A_SECOND + 2.0)
    if piece.kind == "predict":
        return 0.1
    encoder = _encoder_of(piece, plan, cells)
    forward = 0.0
    if encoder is not None:
        tokens = (train.view.image_size[0] // encoder.settings["patch_size"]) ** 2
        forward = 2.0 * parameters(encoder.settings, train.view.image_size, train.view.channels)[0] * tokens
    if piece.kind == "finetune":
        return images * float(piece.settings.get("epochs", 100)) * 3 * forward / rate + 10.0
    seen = min(images, piece.settings.get("limit") or images)
    places = 12 if piece.kind == "select" else 2
    classes = len(train.classes or ()) or 10
    fitting = places * 2.0 * seen * 200 * (300 * classes + 0.2 * seen)
    return (seen * forward + fitting) / rate + 2.0


def _encoder_of(piece: Piece, plan: Plan, cells: Mapping[str, Cell]) -> Cell | None:
    for other in (*piece.needs, *piece.any_of):
        if other in cells:
            return cells[other]
        if plan.pieces[other].kind == "select":
            return _encoder_of(plan.pieces[other], plan, cells)
    return None


def _bytes(piece: Piece, cells: Mapping[str, Cell], sources: Sources) -> int:
    view = sources.train(piece.data).view
    if piece.kind == "pretrain":
        encoder, decoder = parameters(cells[piece.id].settings, view.image_size, view.channels)
        return 4 * (2 * encoder + decoder) + 2**18
    if piece.kind == "fit" and piece.settings.get("kind", "kmeans") in ("kmeans", "random-centroids"):
        return 4 * int(piece.settings.get("k", 50)) * _FEATURES + 2**16
    return 2**16


def _corrected(seconds: Mapping[str, float], plan: Plan, folder: StudyFolder) -> dict[str, float]:
    """Guesses brought to what pieces of the same kind really took."""
    factor = {}
    for kind in plan.count():
        done = [i for i, piece in plan.pieces.items() if piece.kind == kind and folder.piece(i).exists()]
        if done:
            factor[kind] = sum(folder.record(i)["seconds"] for i in done) / sum(seconds[i] for i in done)
    return {i: seconds[i] * factor.get(piece.kind, 1.0) for i, piece in plan.pieces.items()}
