"""How an encoder is judged: features once, every protocol fitted on train alone, test labels read once, at the end.

No protocol is ever given a test label: judges are made from training images, they answer for test images that have no
labels, and only then are the labels unsealed and the answers measured.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from clustermim.data.loaders import Loader, make_loader
from clustermim.data.sources import ImageSource
from clustermim.data.views import ViewConfig
from clustermim.encoders.contract import Encoder, match_channels
from clustermim.errors import InputError
from clustermim.evaluation.cache import (
    FeatureCache,
    Layers,
    Progress,
    Vectors,
    chosen_layers,
    extract,
    fingerprint,
    join,
    silent,
)
from clustermim.evaluation.judging import Answer, Judge, Truth
from clustermim.evaluation.online import Course
from clustermim.evaluation.protocols import (
    PROTOCOLS,
    Bank,
    ProtocolOptions,
    check_protocols,
    check_train,
    validation_rows,
)
from clustermim.evaluation.sealing import Sealed

Key = tuple[int, str, str]
"""(layer, pool, protocol)."""

Judges = dict[Key, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how everything is computed; nothing of it changes a result but `layers`."""

    layers: Layers = "last"
    batch_size: int = 256
    device: str | torch.device = "cpu"
    workers: int | None = None
    cache: FeatureCache | None = None
    fabric: Fabric | None = None
    progress: Progress = silent


DEFAULT_SETTING = Setting()
DEFAULT_OPTIONS = ProtocolOptions()


def evaluate(
    encoder: Encoder,
    train: ImageSource,
    test: ImageSource | Sealed,
    protocols: Sequence[str] = ("knn", "linear"),
    options: ProtocolOptions = DEFAULT_OPTIONS,
    setting: Setting = DEFAULT_SETTING,
) -> list[dict[str, Any]]:
    """Judge one encoder on one data set.

    Parameters
    ----------
    encoder
        Frozen; images are resized to its own size if it has one.
    train, test
        Labelled sources.
    protocols
        Names from `PROTOCOLS`.
    options
        What may be set about them.
    setting
        Where to compute, which layers, the cache on disk.

    Returns
    -------
    list[dict]
        A row for each layer, pool and protocol (few-shot: for each number of shots): `encoder`, `data`, `protocol`,
        `pool` (`cls`: class token or the model's own global vector; `mean`: of the patches; floors name theirs),
        `layer` (0 to `depth` - 1), the protocol's figures, what was chosen, `dim`, `n_train`, `n_test`, `classes`,
        `seed`, and `note` where there is something to know. All values are numbers or text, but `confusion`, the counts
        by true and predicted class.

    Raises
    ------
    InputError
        An unknown protocol, sources that do not fit, or an encoder that cannot take the images.
    """
    check_protocols(protocols)
    for name in protocols:
        if PROTOCOLS[name].on_masks:
            raise InputError(f"The protocol {name!r} judges patches by mask images: give --masks.")
    sealed = test if isinstance(test, Sealed) else Sealed(train, test)
    check_train(train, protocols, options)
    view = view_for(encoder, train.view)
    encoder = encoder.to(setting.device).eval()
    with exact_products():
        vectors = _features(encoder, train, view, setting, train.fingerprint())
        judges = fit_judges(vectors, train, protocols, options, setting, encoder=encoder, view=view)
        test_vectors = _features(encoder, sealed.images, view, setting, sealed.fingerprint)
        answers = ask(judges, test_vectors, setting, _loader(sealed.images, view, setting), encoder)
        rows = measure(judges, answers, sealed.reveal(options.seed), setting.fabric)
    labels = torch.as_tensor(train.labels)
    facts = {"encoder": encoder.name, "data": train.name}
    sizes = {"n_train": len(labels), "n_test": len(sealed.images), "classes": len(np.unique(labels))}
    sizes["seed"] = options.seed
    dims = {key: block.shape[1] for key, block in vectors.items()}
    return [facts | row | {"dim": dims.get((row["layer"], row["pool"]), 0) or _dim(vectors)} | sizes for row in rows]


def _dim(vectors: Vectors) -> int:
    return max(block.shape[1] for block in vectors.values())


def fit_judges(
    vectors: Vectors,
    train: ImageSource,
    protocols: Sequence[str],
    options: ProtocolOptions = DEFAULT_OPTIONS,
    setting: Setting = DEFAULT_SETTING,
    *,
    encoder: Encoder | None = None,
    view: ViewConfig | None = None,
) -> Judges:
    """Every protocol on every layer and pool of the training features.

    Parameters
    ----------
    vectors
        Features of the training images.
    train
        Their labels and groups, and for protocols that train on views the images.
    protocols
        Names from `PROTOCOLS`.
    options, setting
        As for `evaluate`. Of several processes each makes its share of the judges.
    encoder, view
        For the protocols that train on views.
    """
    labels = torch.as_tensor(train.labels, dtype=torch.int64)
    validation = validation_rows(labels, train.groups, options.seed)
    classes = int(labels.max()) + 1
    device, fabric = torch.device(setting.device), setting.fabric
    rank, world = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
    judges: Judges = {}
    for protocol in protocols:
        entry = PROTOCOLS[protocol]
        if entry.on_views is None:
            continue
        assert encoder is not None and view is not None, f"{protocol} is trained on views"
        course = Course(
            encoder=encoder,
            train=train,
            view=view,
            which=chosen_layers(encoder, setting.layers),
            num_classes=classes,
            validation=validation,
            epochs=options.probe_epochs,
            batch_size=setting.batch_size,
            device=device,
            workers=setting.workers,
            seed=options.seed,
            fabric=fabric,
            progress=setting.progress,
        )
        judges |= {(layer, pool, protocol): judge for (layer, pool), judge in entry.on_views(course).items()}
    number = 0
    simple = [protocol for protocol in protocols if PROTOCOLS[protocol].on_features is not None]
    for (layer, pool), features in vectors.items():
        here = features.to(device)
        for protocol in simple:
            number += 1
            if number % world != rank:
                continue
            fit = PROTOCOLS[protocol].on_features
            assert fit is not None
            judges[layer, pool, protocol] = fit(
                Bank(
                    features=here,
                    labels=labels.to(device),
                    num_classes=classes,
                    validation=validation.to(device),
                    options=options,
                )
            )
            setting.progress(f"protocols: {protocol}", number, len(vectors) * len(simple))
    return judges


def ask(
    judges: Judges,
    vectors: Vectors,
    setting: Setting = DEFAULT_SETTING,
    loader: Loader | None = None,
    encoder: Encoder | None = None,
) -> dict[Key, Answer]:
    """The answer of each judge for the test images, which have no labels.

    Parameters
    ----------
    judges
        From `fit_judges`.
    vectors
        Features of the test images.
    setting
        Where to compute.
    loader, encoder
        For the judges that need all tokens: the test images are encoded once more for them.
    """
    streaming = {key: judge for key, judge in judges.items() if hasattr(judge, "see")}
    answers: dict[Key, Answer] = {}
    if streaming:
        assert loader is not None and encoder is not None
        which = sorted({layer for layer, _, _ in streaming})
        seen: dict[Key, list[Tensor]] = {key: [] for key in streaming}
        for batch in loader.epoch():
            with torch.inference_mode():
                outputs = dict(zip(which, encoder.layers(batch.images, which), strict=True))
            for key, judge in streaming.items():
                seen[key].append(judge.see(outputs[key[0]]).cpu())
        for key, judge in streaming.items():
            answers[key] = judge.answer(join(torch.cat(seen[key]), setting.fabric))
    for (layer, pool, protocol), judge in judges.items():
        if (layer, pool, protocol) not in streaming:
            answers[layer, pool, protocol] = judge.answer(vectors[layer, pool].to(setting.device))
    return answers


def measure(
    judges: Mapping[Key, Judge], answers: Mapping[Key, Answer], truth: Truth, fabric: Fabric | None = None
) -> list[dict[str, Any]]:
    """What the answers are worth: the only place that sees test labels.

    Parameters
    ----------
    judges, answers
        From `fit_judges` and `ask`.
    truth
        The test labels.
    fabric
        Gathers the rows of several processes.
    """
    rows: dict[Key, list[dict[str, Any]]] = {}
    for key, answer in answers.items():
        layer, pool, protocol = key
        place = {"protocol": protocol, "pool": pool, "layer": layer}
        rows[key] = [place | figures | judges[key].chosen for figures in answer.figures(truth)]
    if fabric is not None and fabric.world_size > 1:
        parts: list[Any] = [None] * fabric.world_size
        torch.distributed.all_gather_object(parts, rows)
        rows = {key: found for part in parts for key, found in part.items()}
    order = list(PROTOCOLS)
    return [row for key in sorted(rows, key=lambda k: (k[0], k[1], order.index(k[2]))) for row in rows[key]]


def identity(
    encoder: Encoder,
    train: ImageSource,
    test_fingerprint: str,
    protocol: str,
    options: ProtocolOptions,
    layers: Layers,
    masks_fingerprint: str = "",
) -> str:
    """What a row depends on, as 16 hexadecimal digits: equal ones need not be computed again."""
    facts = [
        fingerprint(encoder),
        train.fingerprint(),
        test_fingerprint,
        masks_fingerprint if PROTOCOLS[protocol].on_masks else "",
        view_for(encoder, train.view).to_dict(),
        None if train.groups is None else hashlib.sha256("\0".join(map(str, train.groups)).encode()).hexdigest(),
        protocol,
        asdict(options),
        layers,
        metadata.version("clustermim"),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def view_for(encoder: Encoder, view: ViewConfig) -> ViewConfig:
    """The view of a source at the size that an encoder needs.

    Raises
    ------
    InputError
        The encoder cannot take images of so many channels.
    """
    match_channels(torch.zeros(1, view.channels, 1, 1), encoder.channels, encoder.name)
    size = encoder.image_size or view.image_size
    return ViewConfig.from_dict(view.to_dict() | {"image_size": size})


def _loader(source: ImageSource, view: ViewConfig, setting: Setting) -> Loader:
    fabric = setting.fabric
    return make_loader(
        source,
        view,
        batch_size=setting.batch_size,
        train=False,
        device=setting.device,
        workers=setting.workers,
        rank=0 if fabric is None else fabric.global_rank,
        world_size=1 if fabric is None else fabric.world_size,
    )


def _features(
    encoder: Encoder, source: ImageSource, view: ViewConfig, setting: Setting, data_fingerprint: str
) -> Vectors:
    return extract(
        encoder,
        _loader(source, view, setting),
        setting.layers,
        cache=setting.cache,
        data_fingerprint=data_fingerprint,
        fabric=setting.fabric,
        progress=setting.progress,
    )


class exact_products:
    """Matrix products in full float32 meanwhile: neighbours and optima must not depend on TensorFloat-32."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *error: object) -> None:
        torch.set_float32_matmul_precision(self.before)
