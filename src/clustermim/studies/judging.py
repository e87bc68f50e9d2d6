"""Encoders judged in two steps: layers and pools compared on validation images, then the chosen one on test images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from clustermim.data.loaders import make_loader
from clustermim.data.sources import ImageSource
from clustermim.encoders.contract import Encoder
from clustermim.evaluation.cache import extract
from clustermim.evaluation.evaluating import Setting, ask, exact_products, fit_judges, measure, view_for
from clustermim.evaluation.floors import open_any
from clustermim.evaluation.protocols import ProtocolOptions
from clustermim.evaluation.sealing import Sealed

Validation = Mapping[str, Mapping[str, float]]
"""Protocol -> "layer.pool" -> accuracy on the validation images."""


def open_judged(spec: str, train: ImageSource, device: str) -> Encoder:
    """An encoder on the device that it is judged on."""
    return open_any(spec, train.view).to(device).eval()


def validate(
    encoder: Encoder, train: ImageSource, protocols: Sequence[str], *, seed: int, device: str
) -> dict[str, dict[str, float]]:
    """Accuracy of every layer and pool on a fifth of some training images; test images are not opened.

    Parameters
    ----------
    encoder
        On `device`.
    train
        Labelled training images, or part of them.
    protocols
        Of those that judge features.
    seed
        Of the validation split.
    device
        Where to compute.
    """
    with exact_products():
        vectors = extract(encoder, _loader(encoder, train, device), "all")
        judges = fit_judges(vectors, train, protocols, ProtocolOptions(seed=seed), Setting(layers="all", device=device))
    found: dict[str, dict[str, float]] = {protocol: {} for protocol in protocols}
    for (layer, pool, protocol), judge in judges.items():
        found[protocol][f"{layer}.{pool}"] = float(judge.chosen["val_top1"])
    return found


def best_place(figures: Mapping[str, float]) -> tuple[int, str]:
    """The layer and pool of the highest accuracy; of equals the last layer, then the first pool by name."""
    places = sorted((int(key.partition(".")[0]), key.partition(".")[2]) for key in figures)
    return max(places, key=lambda place: (figures[f"{place[0]}.{place[1]}"], place[0]))


def judge(
    encoder: Encoder,
    train: ImageSource,
    test: ImageSource,
    places: Mapping[str, tuple[int, str]],
    *,
    seed: int,
    device: str,
) -> list[dict[str, Any]]:
    """Fit each protocol on all training images at the layer and pool that was chosen for it, and test it once.

    Parameters
    ----------
    encoder, seed, device
        As for `validate`.
    train, test
        Labelled images.
    places
        Protocol -> (layer, pool).

    Returns
    -------
    list[dict]
        A row for each protocol: `top1` with interval, `layer`, `pool`, what was chosen.
    """
    sealed = Sealed(train, test)
    options, setting = ProtocolOptions(seed=seed), Setting(layers="all", device=device)
    rows: list[dict[str, Any]] = []
    with exact_products():
        layers = tuple(sorted({layer for layer, _ in places.values()}))
        vectors = extract(encoder, _loader(encoder, train, device), layers)
        seen = extract(encoder, _loader(encoder, sealed.images, device), layers)
        judges: dict[Any, Any] = {}
        for protocol, place in places.items():
            judges |= fit_judges({place: vectors[place]}, train, [protocol], options, setting)
        answers = ask(judges, seen, setting)
        rows = measure(judges, answers, sealed.reveal(seed))
    sizes = {"n_train": len(train), "n_test": len(sealed.images)}
    return [{key: value for key, value in row.items() if key != "confusion"} | sizes for row in rows]


def _loader(encoder: Encoder, source: ImageSource, device: str) -> Any:
    return make_loader(source, view_for(encoder, source.view), batch_size=256, train=False, device=torch.device(device))
