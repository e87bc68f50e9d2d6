"""The table of `clustermim probe`: a line for each encoder, layer and pool, a column for each protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clustermim.evaluation.protocols import PROTOCOLS

FLOORS = ("random:", "raw-pixels", "bag-of-tokens:")
"""How the names of encoders begin that no pretraining has touched."""

Row = Mapping[str, Any]


def title(row: Row) -> str:
    """The column that a row belongs to."""
    return f"{row['shots']}-shot" if "shots" in row else PROTOCOLS[row["protocol"]].title


def figure(row: Row) -> float:
    """The number that stands in the row's cell."""
    return float(row[PROTOCOLS[row["protocol"]].metric])


def notes(records: Sequence[Row]) -> list[str]:
    """What the reader must be told, each once."""
    told = (f"{row['encoder']}, {row['pool']}, {title(row)}: {row['note']}" for row in records if "note" in row)
    return list(dict.fromkeys(told))


def tables(records: Sequence[Row]) -> Group:
    """A table for each data set, the best of each protocol in bold, floors dimmed."""
    by_data: dict[str, list[Row]] = {}
    for row in records:
        by_data.setdefault(row["data"], []).append(row)
    parts: list[Table | Text] = []
    for data, rows in by_data.items():
        first = rows[0]
        parts += [
            Text(
                f"{data}: {_measures(rows)} in % on {first['n_test']:,} test images of {first['classes']} classes, "
                f"{first['n_train']:,} for training"
            ),
            _table(rows),
        ]
    told = (
        "± is half of the 95 % interval: bootstrap over test images or groups; for few-shot over draws. What is chosen "
        "was chosen on a fifth of the training images. Dimmed lines are floors."
    )
    return Group(*parts, Text(told, style="dim"), *(Text(f"Note: {note}", style="yellow") for note in notes(records)))


def _measures(rows: Sequence[Row]) -> str:
    words = {"top1": "top-1 accuracy", "map": "mAP", "accuracy": "accuracy of clusters", "miou": "mIoU"}
    return ", ".join(dict.fromkeys(words[PROTOCOLS[row["protocol"]].metric] for row in rows))


def _table(rows: Sequence[Row]) -> Table:
    columns = list(dict.fromkeys(title(row) for row in rows))
    many_layers = any(
        len({row["layer"] for row in rows if row["encoder"] == name}) > 1 for name in {r["encoder"] for r in rows}
    )
    lines: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["encoder"], row["layer"], row["pool"]), {})[title(row)] = row
    best = {column: max(figure(row) for row in rows if title(row) == column) for column in columns}
    # With many protocols there is no room to tell what was chosen; the records hold it.
    few = columns if len(columns) <= 3 else []
    explained = [column for column in few if any(_chosen(row) for row in rows if title(row) == column)]
    table = Table()
    table.add_column("encoder", overflow="fold")
    for name in (["layer"] if many_layers else []) + ["pool"]:
        table.add_column(name)
    table.add_column("dim", justify="right")
    for column in columns:
        table.add_column(column, justify="right")
        if column in explained:
            table.add_column("chosen", style="dim")
    for (name, layer, pool), found in lines.items():
        cells = [name, *([str(layer)] if many_layers else []), pool, f"{next(iter(found.values()))['dim']:,}"]
        for column in columns:
            held = found.get(column)
            text = "" if held is None else _cell(held)
            cells.append(f"[bold]{text}[/]" if held is not None and figure(held) == best[column] else text)
            if column in explained:
                cells.append("" if held is None else _chosen(held))
        table.add_row(*cells, style="dim" if name.startswith(FLOORS) else None)
    return table


def _cell(row: Row) -> str:
    metric = PROTOCOLS[row["protocol"]].metric
    half = 50 * (row[f"{metric}_high"] - row[f"{metric}_low"])
    return f"{100 * row[metric]:.1f} ±{half:.1f}"


def _chosen(row: Row) -> str:
    if "k" in row:
        return f"k {row['k']}"
    if "shots" in row or "weight_decay" not in row:
        return f"lr {row['lr']:.0e}" if "val_top1" in row and "lr" in row else ""
    return f"decay {row['weight_decay']:.0e}"
