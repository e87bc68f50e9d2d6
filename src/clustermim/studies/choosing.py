"""Which learning rate, layer and pool a cell takes: whatever did best on validation images, never on test images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clustermim.errors import InputError
from clustermim.studies.folder import StudyFolder
from clustermim.studies.judging import best_place
from clustermim.studies.pieces import Piece, Plan


@dataclass(frozen=True)
class Choice:
    """The trial that did best."""

    pretrain: str
    """Its piece."""
    lr: float
    validation: float | None
    """Its accuracy on validation images by the linear probe; None where nothing is labelled."""


def choose_trial(plan: Plan, folder: StudyFolder, deciding: tuple[str, ...]) -> Choice:
    """The best of the trials of one cell.

    Parameters
    ----------
    plan, folder
        The study.
    deciding
        One piece for each learning rate: a `select`, by whose linear accuracy the trial is judged, or, without labels,
        the `pretrain` itself, by its last loss. Those that failed do not stand for election.

    Raises
    ------
    InputError
        All of them failed.
    """
    found = []
    for identity in deciding:
        if not folder.piece(identity).exists():
            continue
        piece, result = plan.pieces[identity], folder.result(identity)
        run = piece if piece.kind == "pretrain" else plan.pieces[piece.needs[0]]
        lr = float(run.settings["lr"])
        if piece.kind == "pretrain":
            found.append((float(result["loss"]), lr, Choice(run.id, lr, None)))
        else:
            accuracy = max(result["validation"]["linear"].values())
            found.append((-accuracy, lr, Choice(run.id, lr, accuracy)))
    if not found:
        raise InputError("No learning rate of this cell came to an end.")
    return min(found, key=lambda one: one[:2])[2]


def deciding_of(plan: Plan, piece: Piece) -> tuple[str, ...]:
    """Of the pieces that `piece` takes the best of, those that decide: the selects on the first data set judged on."""
    first = plan.pieces[piece.any_of[0]].data
    return tuple(other for other in piece.any_of if plan.pieces[other].data == first)


def first_round_run(target: str, piece: Piece, plan: Plan, folder: StudyFolder) -> str:
    """The chosen training of a target whose encoder the features of `piece`, a second-round fit, are made of."""
    cell = next(c for c in plan.cells if c.data == piece.data and c.settings["named"] == target)
    runs = {trial.pretrain for trial in cell.trials}
    own = [o for o in piece.any_of if o in runs or set(plan.pieces[o].needs) & runs]
    return choose_trial(plan, folder, tuple(own)).pretrain


def judged_run(piece: Piece, plan: Plan, folder: StudyFolder) -> str:
    """The training that a probe or fine-tuning judges: the best trial of the cell, or the one it was planned for."""
    if piece.any_of:
        return choose_trial(plan, folder, deciding_of(plan, piece)).pretrain
    first = plan.pieces[piece.needs[0]]
    return first.id if first.kind == "pretrain" else first.needs[0]


def select_for(plan: Plan, piece: Piece, run: str) -> str:
    """The select of a run on the data set that `piece` judges on."""
    for other in (*piece.needs, *piece.any_of):
        candidate = plan.pieces[other]
        if candidate.kind == "select" and candidate.data == piece.data and candidate.needs == (run,):
            return other
    raise InputError(f"{piece.name}: no layer was chosen for {run}.")


def places(result: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Protocol -> (layer, pool) that did best on validation images, from the result of a select."""
    return {protocol: best_place(figures) for protocol, figures in result["validation"].items()}
