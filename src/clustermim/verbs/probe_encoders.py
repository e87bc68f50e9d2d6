"""`clustermim probe`: judge encoders, and the floors they must beat, by one protocol or many."""

import contextlib
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from clustermim.data.options import DataOptions
from clustermim.data.sources import ImageSource, open_splits
from clustermim.encoders.contract import Encoder
from clustermim.errors import InputError
from clustermim.evaluation.cache import FeatureCache, Layers, Progress
from clustermim.evaluation.evaluating import Setting, evaluate, identity, view_for
from clustermim.evaluation.fewshot import DRAWS, SHOTS
from clustermim.evaluation.floors import open_any
from clustermim.evaluation.protocols import ProtocolOptions, check_protocols, check_train
from clustermim.evaluation.sealing import Sealed
from clustermim.runs import atomic_write
from clustermim.training.launch import Device, make_fabric
from clustermim.verbs.probe_table import notes, tables

Name = Literal["knn", "linear", "linear-mae", "attentive", "fewshot", "retrieval", "cluster"]


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
        draws; `retrieval`: mean average precision; `cluster`: K-means, matched to the classes.
    layers
        Judge the last layer, or all of them.
    shots
        For fewshot: images a class.
    draws
        For fewshot: how often so few images are drawn.
    probe_epochs
        For linear-mae and attentive: epochs. Default: 90 and 30.
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
        (opened, train, test)
        for train, test in _open_sources(sources, options or DataOptions(), protocols, how)
        for opened in _open_encoders(encoders, train).values()
    ]
    fabric.launch()
    records: list[dict[str, Any]] = []
    confusions: list[dict[str, Any]] = []
    with _bar(len(jobs), show=fabric.is_global_zero) as told:
        for number, (opened, train, test) in enumerate(jobs):
            marks = {name: identity(opened, train, test, name, how, layers) for name in protocols}
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
                for row in evaluate(opened, train, test, missing, how, setting):
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


def _open_sources(
    sources: Sequence[Any], options: DataOptions, protocols: Sequence[str], how: ProtocolOptions
) -> list[tuple[ImageSource, Sealed]]:
    opened = []
    for source in sources:
        train, test = open_splits(source, options)
        sealed = Sealed(train, test)
        check_train(train, protocols, how)
        message = train.skipped_message()
        if message is not None:
            Console(stderr=True).print(Text(f"Warning: {message}", style="yellow"))
        opened.append((train, sealed))
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


@contextlib.contextmanager
def _bar(jobs: int, *, show: bool) -> Iterator[Any]:
    """A bar on stderr, if it is a terminal; gives a function from the number of a job to what `evaluate` tells."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not (show and console.is_terminal), transient=True) as bar:
        task = bar.add_task("", total=None)

        def told(number: int) -> Progress:
            def tell(what: str, done: int, total: int) -> None:
                bar.update(task, description=f"[{number + 1}/{jobs}] {what}", completed=done, total=total)

            return tell

        yield told
