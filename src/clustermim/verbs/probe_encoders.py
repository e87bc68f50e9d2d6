"""`clustermim probe`: judge encoders, and the floors they must beat, by k-NN and linear probe."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from clustermim.data.options import DataOptions
from clustermim.data.sources import ImageSource, open_splits
from clustermim.encoders.contract import Encoder
from clustermim.errors import InputError
from clustermim.evaluation.cache import Layers, Progress
from clustermim.evaluation.floors import open_any
from clustermim.evaluation.protocols import check_protocols, check_sources, evaluate, view_for
from clustermim.runs import atomic_write
from clustermim.training.launch import Device, resolve_device

TITLES = {"knn": "k-NN", "linear": "linear"}
"""Protocol -> title of its column; others go by their own name."""

FLOORS = ("random:", "raw-pixels", "bag-of-tokens:")
"""How the names of encoders begin that no pretraining has touched."""


def _texts(kind: Any, tokens: Sequence[Token]) -> list[str]:
    """What stands behind an option, word by word: objects come only from Python."""
    return [token.value for token in tokens]


def _many(name: str) -> Parameter:
    """Several words behind one option; the name keeps it from being taken by its place."""
    return Parameter(name=name, consume_multiple=True, n_tokens=-1, converter=_texts, negative="")


@dataclass(frozen=True)
class ProbeResult:
    """How each encoder did on each data set."""

    records: list[dict[str, Any]]
    """See `clustermim.evaluation.protocols.evaluate`."""

    def rows(self) -> list[dict[str, Any]]:
        """One flat record for each encoder, data set, layer, pool and protocol; `top1` is in [0, 1]."""
        return self.records

    @property
    def notes(self) -> list[str]:
        """What the reader must be told, each once."""
        return list(
            dict.fromkeys(
                f"{row['encoder']}, {row['pool']}, {TITLES.get(row['protocol'], row['protocol'])}: {row['note']}"
                for row in self.records
                if "note" in row
            )
        )

    def __rich__(self) -> Group:
        """A table for each data set, the best of each protocol in bold, floors dimmed."""
        by_data: dict[str, list[dict[str, Any]]] = {}
        for row in self.records:
            by_data.setdefault(row["data"], []).append(row)
        parts: list[Table | Text] = []
        for data, rows in by_data.items():
            first = rows[0]
            parts.append(
                Text(
                    f"{data}: top-1 accuracy in % on {first['n_test']:,} test images of {first['classes']} classes, "
                    f"{first['n_train']:,} for training"
                )
            )
            parts.append(_table(rows))
        told = "k and weight decay were chosen on a fifth of the training images; dimmed lines are floors."
        parts += [Text(told, style="dim"), *(Text(f"Note: {note}", style="yellow") for note in self.notes)]
        return Group(*parts)


def probe(
    encoder: Annotated[Any, _many("--encoder")],
    data: Annotated[Any, _many("--data")] = "digits",
    *,
    protocol: Annotated[Sequence[Literal["knn", "linear"]], Parameter(consume_multiple=True, negative="")] = (
        "knn",
        "linear",
    ),
    layers: Layers = "last",
    json: Path | None = None,
    batch_size: int = 256,
    device: Device = "auto",
    workers: int | None = None,
    seed: int = 0,
    options: Annotated[DataOptions | None, Parameter(name="*")] = None,
) -> ProbeResult:
    """Judge encoders by k-NN and linear probe on frozen features.

    Each encoder is run over each data set once. Hyperparameters (k, weight decay) are chosen on a fifth of the training
    images; test images are read once, at the end. Class token and mean of the patches are both reported.

    Parameters
    ----------
    encoder
        One or several: run directories, timm:NAME[@FILE], or floors: raw-pixels, random:MODEL, bag-of-tokens:DIR. In
        Python also modules.
    data
        One or several labelled data sets.
    protocol
        How to judge.
    layers
        Judge the last layer, or all of them.
    json
        Write the table's rows to this file.
    batch_size
        Images at a time; it changes the speed only.
    device
        Where features are computed and judged.
    workers
        Processes that read images; default: as the source needs.
    seed
        Seed of the validation split.
    options
        How the images are read.

    Returns
    -------
    ProbeResult
        `rows()` gives flat records; it prints as a table.

    Raises
    ------
    InputError
        An encoder or data set that cannot be opened, no labels, a single class, a class that only the test images have.
    """
    encoders, sources = _as_list(encoder), _as_list(data)
    if not encoders or not sources:
        raise InputError(f"There is nothing to judge{'' if encoders else ': give --encoder ENC [ENC ...]'}.")
    protocols = [protocol] if isinstance(protocol, str) else list(protocol)
    check_protocols(protocols)
    if json is not None and json.is_dir():
        raise InputError(f"--json {json} is a folder; name a file to write to.")
    where = resolve_device(device)
    # Everything is opened and checked before anything is computed.
    jobs = [
        (opened, train, test)
        for train, test in _open_sources(sources, options or DataOptions())
        for opened in _open_encoders(encoders, train).values()
    ]
    records: list[dict[str, Any]] = []
    with _bar(len(jobs)) as told:
        for number, (opened, train, test) in enumerate(jobs):
            records += evaluate(
                opened,
                train,
                test,
                protocols,
                layers=layers,
                batch_size=batch_size,
                device=where,
                workers=workers,
                seed=seed,
                progress=told(number),
            )
            opened.to("cpu")
    result = ProbeResult(records)
    if json is not None:
        atomic_write(json, dumps(result.rows(), indent=2) + "\n")
    return result


def _as_list(given: Any) -> list[Any]:
    """A list stands for several; anything else, a pair of arrays for one, is one."""
    return list(given) if isinstance(given, list) else [given]


def _open_sources(sources: Sequence[Any], options: DataOptions) -> list[tuple[ImageSource, ImageSource]]:
    opened = []
    for source in sources:
        train, test = open_splits(source, options)
        check_sources(train, test)
        message = train.skipped_message()
        if message is not None:
            Console(stderr=True).print(Text(f"Warning: {message}", style="yellow"))
        opened.append((train, test))
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
def _bar(jobs: int) -> Iterator[Any]:
    """A bar on stderr, if it is a terminal; gives a function from the number of a job to what `evaluate` tells."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)

        def told(number: int) -> Progress:
            def tell(what: str, done: int, total: int) -> None:
                bar.update(task, description=f"[{number + 1}/{jobs}] {what}", completed=done, total=total)

            return tell

        yield told


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line for each encoder, layer and pool; a column for each protocol."""
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    many_layers = any(
        len({row["layer"] for row in rows if row["encoder"] == name}) > 1 for name in {r["encoder"] for r in rows}
    )
    lines: dict[tuple[str, int, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["encoder"], row["layer"], row["pool"]), {})[row["protocol"]] = row
    best = {p: max(row["top1"] for row in rows if row["protocol"] == p) for p in protocols}
    table = Table()
    table.add_column("encoder", overflow="fold")
    for name in (["layer"] if many_layers else []) + ["pool"]:
        table.add_column(name)
    table.add_column("dim", justify="right")
    for protocol in protocols:
        table.add_column(TITLES.get(protocol, protocol), justify="right")
        table.add_column("chosen", style="dim")
    for (name, layer, pool), found in lines.items():
        cells = [name, *([str(layer)] if many_layers else []), pool, f"{next(iter(found.values()))['dim']:,}"]
        for protocol in protocols:
            top1 = found[protocol]["top1"]
            figure = f"{100 * top1:.1f}"
            cells += [f"[bold]{figure}[/]" if top1 == best[protocol] else figure, _chosen(found[protocol])]
        table.add_row(*cells, style="dim" if name.startswith(FLOORS) else None)
    return table


def _chosen(row: Mapping[str, Any]) -> str:
    if "k" in row:
        return f"k {row['k']}"
    return f"decay {row['weight_decay']:.0e}" if "weight_decay" in row else ""
