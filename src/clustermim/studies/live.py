"""What a person sees while a study runs: pieces by kind, what is being done, what failed, how long it may take."""

import json
import os
from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clustermim.studies.folder import SETTLED, State, StudyFolder
from clustermim.studies.pieces import Piece, Plan
from clustermim.studies.states import why
from clustermim.training.progress import duration

TITLES = {
    "fit": "tokenizers fitted",
    "score": "tokenizers scored",
    "predict": "predictions written down",
    "pretrain": "encoders pretrained",
    "select": "layers compared on validation images",
    "probe": "encoders judged on test images",
    "finetune": "encoders fine-tuned",
}


def progress_table(
    folder: StudyFolder, plan: Plan, states: Mapping[str, State], estimate: Mapping[str, float], jobs: int
) -> Group:
    """A table of the pieces by kind, and a line for each that is being done or failed.

    Parameters
    ----------
    folder, plan, states
        The study as it stands.
    estimate
        Seconds that each piece is thought to take.
    jobs
        Processes on this machine.
    """
    table = Table(title=f"{folder.path}", title_justify="left")
    table.add_column("", no_wrap=True)
    for title in ("done", "running", "failed", "given up", "to do"):
        table.add_column(title, justify="right")
    for kind, total in plan.count().items():
        found = [states[piece.id] for piece in plan.pieces.values() if piece.kind == kind]
        counts = {state: found.count(state) for state in ("done", "running", "failed", "given up")}
        to_do = total - sum(counts.values())
        table.add_row(TITLES[kind], *(str(n) if n else "" for n in (*counts.values(), to_do)))
    lines = [Text(_now(folder, plan.pieces[i])) for i, s in states.items() if s == "running"]
    lines += [
        Text(f"failed: {plan.pieces[i].kind} of {plan.pieces[i].name}: {why(plan, folder, states, i)}", style="red")
        for i, s in states.items()
        if s == "failed"
    ]
    left = sum(estimate.get(i, 0.0) for i, s in states.items() if s not in SETTLED) / max(1, jobs)
    lines.append(Text(f"about {duration(left)} to go", style="dim"))
    return Group(table, *lines)


def _now(folder: StudyFolder, piece: Piece) -> str:
    """What a running piece has come to."""
    line = f"now: {piece.kind} of {piece.name}"
    row = _last_row(folder.work(piece.id) / "run" / "metrics.jsonl")
    if row is None:
        return line
    return f"{line}: epoch {row.get('epoch', 0):.1f} of {piece.settings['epochs']}, loss {row.get('loss', 0):.4g}"


def _last_row(file: os.PathLike[str]) -> dict[str, float] | None:
    """The last whole row of a file of metrics, without reading the others."""
    try:
        with open(file, "rb") as opened:  # noqa: PTH123
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - 4096))
            for line in reversed(opened.read().splitlines()):
                try:
                    row: dict[str, float] = json.loads(line)
                except ValueError:
                    continue
                return row
    except OSError:
        pass
    return None
