"""`clustermim probe`: judge encoders, and the floors they must beat, by one protocol or many."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token
from rich.console import Console, Group
from rich.text import Text

from clustermim.data.mask_images import MaskImages
from clustermim.data.options import DataOptions
from clustermim.data.sources import ImageSource, open_splits
from clustermim.encoders.contract import Encoder
from clustermim.errors import InputError
from clustermim.evaluation.cache import FeatureCache, Layers
from clustermim.evaluation.dense import evaluate_patches
from clustermim.evaluation.evaluating import Setting, evaluate, identity, view_for
from clustermim.evaluation.fewshot import DRAWS, SHOTS
from clustermim.evaluation.floors import open_any
from clustermim.evaluation.protocols import PROTOCOLS, ProtocolOptions, check_protocols, check_train
from clustermim.evaluation.sealing import Sealed
from clustermim.runs import atomic_write
from clustermim.training.launch import Device, make_fabric
from clustermim.verbs.job_progress import job_bar
from clustermim.verbs.probe_table import notes, tables

Name = Literal[
    "knn", "linear", "linear-mae", "attentive", "fewshot", "retrieval", "cluster", "patch-knn", "patch-linear"
]


def _texts(kind: Any, tokens: Sequence[Token]) -> list[str]:
    """What stands behind an option, word by word: objects come only from Python."""
    return [token.value for token in tokens]


def _many(name: str) -> Parameter:
    """Several words behind one option; the name keeps it from being taken by its place."""
    return Parameter(name=name, consume_multiple=True, n_tokens=-1, converter=_texts, negative="")


_SEVERAL = Parameter(consume_multiple=True, negative="")


@dataclass(frozen=True)
class ProbeResult:
    """How each encoder did on each data set."""

    records: list[dict[str, Any]]
    """See `clustermim.evaluation.evaluating.evaluate`."""

    confusions: list[dict[str, Any]] = field(default_factory=list)
    """Of each row that has classes and was computed in this call: `fingerprint`, `layer`, `pool`, and `confusion`, the
    counts by true (outer) and predicted class."""

    def rows(self) -> list[dict[str, Any]]:
        """One flat record for each encoder, data set, layer, pool and protocol; accuracies are in [0, 1]."""
        return self.records

    @property
    def notes(self) -> list[str]:
        """What the reader must be told, each once."""
        return notes(self.records)

    def __rich__(self) -> Group:
        """A table for each data set, the best of each protocol in bold, floors dimmed."""
        return tables(self.records)


def probe(
    encoder: Annotated[Any, _many("--encoder")],
    data: Annotated[Any, _many("--data")] = "digits",
    *,
    protocol: Annotated[Sequence[Name], _SEVERAL] = ("knn", "linear"),
    layers: Layers = "last",
    shots: Annotated[tuple[int, ...], _SEVERAL] = SHOTS,
    draws: int = DRAWS,
    probe_epochs: int | None = None,
    masks: Annotated[Any, Parameter()] = None,
    json: Path | None = None,
    resume: bool = False,
    confusion: Path | None = None,
    cache: Path | None = None,
    batch_size: int = 256,
    device: Device = "auto",
    devices: int = 1,
    workers: int | None = None,
    seed: int = 0,
    options: Annotated[DataOptions | None, Parameter(name="*")] = None,
) -> ProbeResult:
    """Judge encoders on labelled images: k-NN, linear probes, few-shot, retrieval, clustering.

    Each encoder is run over each data set once. Hyperparameters (k, weight decay) are chosen on a fifth of the training
    images; test labels are read once, at the end. Class token and mean of the patches are both reported, with 95 %
    intervals. Encoders pretrained on one data set may be judged on others: give several --data.

    Parameters
    ----------
    encoder
        One or several: run directories, timm:NAME[@FILE], or floors: raw-pixels, random:MODEL, bag-of-tokens:DIR. In
        Python also modules.
    data
        One or several labelled data sets.
    protocol
        How to judge, one or several. `knn`; `linear`: logistic regression to its optimum; `linear-mae`: batch norm and
        a linear layer, LARS, 90 epochs of views; `attentive`: a learned query over all tokens; `fewshot`: mean of ten
        draws; `retrieval`: mean average precision; `cluster`: K-means, matched to the classes; `patch-knn` and
        `patch-linear`: the class of each patch, judged by --masks.
    layers
        Judge the last layer, or all of them.
    shots
        For fewshot: images a class.
    draws
        For fewshot: how often so few images are drawn.
    probe_epochs
        For linear-mae and attentive: epochs. Default: 90 and 30.
    masks
        For patch-knn and patch-linear: folder of mask images called as the images are, or .npz with `masks` (n, H, W).
        Pixel values are classes, 255 is none. With these protocols alone the images need no labels.
    json
        Write the table's rows to this file, after each encoder and data set.
    resume
        Keep the rows that --json holds already and compute only what is missing.
    confusion
        Write a confusion matrix for each row to this folder, as FINGERPRINT-LAYER-POOL.csv.
    cache
        Keep features in this folder and take them from there the next time.
    batch_size
        Images at a time; it changes the speed only.
    device
        Where features are computed and judged.
    devices
        How many of them, a process each; under torchrun or SLURM their count is taken from there.
    workers
        Processes that read images; default: as the source needs.
    seed
        Seed of the validation split, the draws of few images and the bootstrap.
    options
        How the images are read.

    Returns
    -------
    ProbeResult
        `rows()` gives flat records; it prints as a table.

    Raises
    ------
    InputError
        An encoder or data set that cannot be opened, no labels, a single class, a class that only the test images have,
        fewer images than shots.
    """
    encoders, sources = _as_list(encoder), _as_list(data)
    if not encoders or not sources:
        raise InputError(f"There is nothing to judge{'' if encoders else ': give --encoder ENC [ENC ...]'}.")
    protocols = list(dict.fromkeys([protocol] if isinstance(protocol, str) else protocol))
    check_protocols(protocols)
    how = ProtocolOptions(shots=tuple(shots), draws=draws, probe_epochs=probe_epochs, seed=seed)
    earlier = _earlier_rows(json, resume)
    if cache is not None and cache.exists() and not cache.is_dir():
        raise InputError(f"--cache {cache} is a file; name a folder.")
    fabric = make_fabric(device, devices, "32-true")
    # Everything is opened and checked before anything is computed.
    jobs = [
        (opened, opening)
        for opening in _open_sources(sources, options or DataOptions(), protocols, how, masks)
        for opened in _open_encoders(encoders, opening.train).values()
    ]
    fabric.launch()
    records: list[dict[str, Any]] = []
    confusions: list[dict[str, Any]] = []
    with job_bar(len(jobs), show=fabric.is_global_zero) as told:
        for number, (opened, opening) in enumerate(jobs):
            train, facts = opening.train, (how, layers, opening.masks_fingerprint)
            marks = {name: identity(opened, train, opening.fingerprint, name, *facts) for name in protocols}
            kept = [row | {"encoder": opened.name} for row in earlier if row["fingerprint"] in marks.values()]
            missing = [n for n in protocols if marks[n] not in {row["fingerprint"] for row in kept}]
            if missing:
                setting = Setting(
                    layers=layers,
                    batch_size=batch_size,
                    device=fabric.device,
                    workers=workers,
                    cache=None if cache is None else FeatureCache(cache),
                    fabric=fabric,
                    progress=told(number),
                )
                for row in _judge(opened, opening, missing, how, setting, masks):
                    row["fingerprint"] = marks[row["protocol"]]
                    if "confusion" in row:
                        place = {key: row[key] for key in ("fingerprint", "layer", "pool")}
                        confusions.append(place | {"confusion": row.pop("confusion"), "classes": train.classes})
                    kept.append(row)
                opened.to("cpu")
            records += sorted(kept, key=lambda row: (row["layer"], row["pool"], protocols.index(row["protocol"])))
            if fabric.is_global_zero:
                done = {row["fingerprint"] for row in records}
                _write(json, records + [row for row in earlier if row["fingerprint"] not in done])
                _write_confusions(confusion, confusions)
    if fabric.is_global_zero and not resume:
        _write(json, records)
    return ProbeResult(records, confusions)


def _earlier_rows(json: Path | None, resume: bool) -> list[dict[str, Any]]:
    """The rows of an earlier call, if they are to be kept."""
    if json is not None and json.is_dir():
        raise InputError(f"--json {json} is a folder; name a file to write to.")
    if resume and json is None:
        raise InputError("--resume keeps the rows of an earlier call: name its file with --json.")
    if not resume or json is None or not json.exists():
        return []
    try:
        rows = loads(json.read_text())
    except ValueError as problem:
        raise InputError(f"--resume: {json} is damaged ({problem}). Remove it, or name another file.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "fingerprint" in row for row in rows):
        raise InputError(f"--resume: {json} holds no rows of `clustermim probe`. Name another file.")
    return rows


def _write(json: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    if json is not None:
        atomic_write(json, dumps(rows, indent=2) + "\n")


def _write_confusions(folder: Path | None, confusions: Sequence[Mapping[str, Any]]) -> None:
    """A file for each matrix: rows are true classes, columns predicted ones."""
    if folder is None:
        return
    for found in confusions:
        counts = found["confusion"]
        names = found["classes"] or range(len(counts))
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["true class", *names])
        writer.writerows([name, *row] for name, row in zip(names, counts, strict=False))
        atomic_write(folder / f"{found['fingerprint']}-{found['layer']}-{found['pool']}.csv", text.getvalue())


def _as_list(given: Any) -> list[Any]:
    """A list stands for several; anything else, a pair of arrays for one, is one."""
    return list(given) if isinstance(given, list) else [given]


@dataclass(frozen=True, kw_only=True)
class _Opening:
    """A data set whose splits are open and checked."""

    train: ImageSource
    test: ImageSource
    sealed: Sealed | None
    """None where all protocols judge by masks, which takes no labels."""
    fingerprint: str
    masks_fingerprint: str


def _judge(
    encoder: Encoder, opening: _Opening, protocols: Sequence[str], how: ProtocolOptions, setting: Setting, masks: Any
) -> list[dict[str, Any]]:
    """Rows of the protocols that judge images, then of those that judge patches."""
    patches = [name for name in protocols if PROTOCOLS[name].on_masks]
    images = [name for name in protocols if name not in patches]
    rows: list[dict[str, Any]] = []
    if images:
        assert opening.sealed is not None
        rows += evaluate(encoder, opening.train, opening.sealed, images, how, setting)
    if patches:
        rows += evaluate_patches(encoder, opening.train, opening.test, masks, patches, how, setting)
    return rows


def _open_sources(
    sources: Sequence[Any], options: DataOptions, protocols: Sequence[str], how: ProtocolOptions, masks: Any
) -> list[_Opening]:
    by_masks = [name for name in protocols if PROTOCOLS[name].on_masks]
    if by_masks and masks is None:
        raise InputError(f"The protocol {by_masks[0]!r} judges patches by mask images: give --masks.")
    if by_masks and len(sources) > 1:
        raise InputError("--masks belong to one data set: give a single --data with them.")
    opened = []
    for source in sources:
        train, test = open_splits(source, options)
        sealed = None
        if len(by_masks) < len(protocols):
            sealed = Sealed(train, test)
            check_train(train, protocols, how)
        prints = [MaskImages(masks, split).fingerprint() for split in (train, test)] if by_masks else []
        message = train.skipped_message()
        if message is not None:
            Console(stderr=True).print(Text(f"Warning: {message}", style="yellow"))
        opened.append(
            _Opening(
                train=train,
                test=test,
                sealed=sealed,
                fingerprint=test.fingerprint() if sealed is None else sealed.fingerprint,
                masks_fingerprint=" ".join(prints),
            )
        )
    return opened


def _open_encoders(specs: Sequence[Any], train: ImageSource) -> Mapping[str, Encoder]:
    """Encoders by the name that the table gives them; a number is added where two would share one."""
    opened: dict[str, Encoder] = {}
    for spec in specs:
        encoder = open_any(spec, train.view)
        view_for(encoder, train.view)
        stem = encoder.name
        names = [stem, *(f"{stem} ({i})" for i in range(2, len(specs) + 2))]
        encoder.name = next(name for name in names if name not in opened)
        opened[encoder.name] = encoder
    return opened
