"""`clustermim study`: a recipe becomes a table and a page that say which target to pretrain on."""

import hashlib
import json as jsonlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from cyclopts import Parameter
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from clustermim.errors import InputError
from clustermim.runs import atomic_write
from clustermim.studies.checking import check_precisions
from clustermim.studies.collecting import Findings, collect
from clustermim.studies.costing import Cost, check_space, estimate_cost
from clustermim.studies.folder import SETTLED, StudyFolder
from clustermim.studies.live import TITLES
from clustermim.studies.opening import Sources
from clustermim.studies.pieces import Plan
from clustermim.studies.planning import make_plan
from clustermim.studies.ranks import local_place, standing_alone
from clustermim.studies.reading import read_recipe
from clustermim.studies.recipe import parse_recipe
from clustermim.studies.states import perhaps_remade, remade, states_of
from clustermim.studies.supervising import Crew, supervise, write_recipe
from clustermim.studies.tables import findings_tables
from clustermim.studies.writing import write_findings
from clustermim.training.launch import Device, listen_for_stop, resolve_device
from clustermim.training.progress import duration


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a study found, or, of a dry run, what it would do.

    Attributes
    ----------
    out
        The study's folder; None for a dry run.
    plan
        Its pieces.
    findings
        What came out; None for a dry run.
    cost
        What was thought beforehand.
    """

    out: Path | None
    plan: Plan = field(repr=False)
    findings: Findings | None = field(default=None, repr=False)
    cost: Cost | None = field(default=None, repr=False)
    jobs: int = 1
    states: Mapping[str, str] = field(default_factory=dict, repr=False)
    remarks: Sequence[str] = ()
    """On work that is done again."""

    @property
    def failed(self) -> int:
        """Pieces that failed."""
        return sum(state == "failed" for state in self.states.values())

    def rows(self) -> list[dict[str, Any]]:
        """Flat records: one a tokenizer, one a trained encoder, one a floor; of a dry run, one a piece."""
        if self.findings is not None:
            return self.findings.rows()
        assert self.cost is not None
        return [
            {"piece": i, "kind": p.kind, "name": p.name, "state": self.states[i], "seconds": self.cost.seconds[i]}
            for i, p in self.plan.pieces.items()
        ]

    def __rich__(self) -> Group:
        """The table and where the page is; of a dry run the plan."""
        if self.findings is None or self.out is None:
            return self._plan_table()
        page = Text(str(self.out / "report.html"), no_wrap=True, overflow="ignore")
        return Group(findings_tables(self.findings), Text("\nEverything is told, with pictures, in"), page)

    def _plan_table(self) -> Group:
        assert self.cost is not None
        table = Table(title="Dry run: nothing was written", title_justify="left")
        for title in ("", "pieces", "done", "time of one process", "on disk"):
            table.add_column(title, justify="left" if not title else "right")
        for kind, count in self.plan.count().items():
            ids = [i for i, piece in self.plan.pieces.items() if piece.kind == kind]
            left = [i for i in ids if self.states[i] not in SETTLED]
            table.add_row(
                TITLES[kind],
                str(count),
                str(len(ids) - len(left)) if len(left) < len(ids) else "",
                duration(sum(self.cost.seconds[i] for i in left)),
                f"{sum(self.cost.bytes[i] for i in left) / 2**20:,.0f} MiB",
            )
        cells = Table(title="Cells", title_justify="left")
        for title in ("data", "target", "model", "epochs", "learning rates", "seeds"):
            cells.add_column(title)
        for cell in self.plan.cells:
            lrs = " ".join(f"{trial.lr:g}" for trial in cell.trials)
            seeds = " ".join(str(run.seed) for run in cell.runs)
            cells.add_row(cell.data, cell.name, cell.settings["model"], str(cell.settings["epochs"]), lrs, seeds)
        total = self.cost.left(self.states)
        lines = [
            f"About {duration(total)} of work, so about {duration(total / self.jobs)} with --jobs {self.jobs}; a rough "
            f"guess from {self.cost.rate / 1e9:,.0f} billion operations a second, measured in a few training steps."
        ]
        return Group(table, cells, *(Text(line) for line in [*lines, *self.remarks, *self.plan.notes]))


def study(
    recipe: str,
    *,
    out: Path,
    size: str | None = None,
    set: Annotated[Sequence[str], Parameter(consume_multiple=True, negative="")] = (),
    jobs: int | None = None,
    device: Device = "auto",
    workers: int | None = None,
    max_minutes: float | None = None,
    dry_run: bool = False,
    resume: bool = False,
    retry_failed: bool = False,
    json: Path | None = None,
) -> StudyResult:
    """Does a score foretell what training finds, and which target is best on your images? One recipe, one page.

    Fits and scores the tokenizers of a grid, writes down what each score foretells, pretrains on every target with the
    same budget, judges the encoders, and tells in OUT/report.html how well each score ranked them. Learning rate and
    layer are chosen on validation images. What is finished is never repeated: a study that was stopped or killed is
    continued by --resume, and any number of processes and machines may work in one folder, each started with --resume.

    Parameters
    ----------
    recipe
        A packaged recipe (digits, cifar10, ...), or a YAML file.
    out
        Folder for everything; must be new or empty.
    size
        Lay the values that the recipe has under `sizes: NAME` over the others, such as `gpu`.
    set
        Change single values: KEY=VALUE, with dots between nested keys, such as pretrain.epochs=1.
    jobs
        Processes on this machine that work side by side. Default: one for each GPU, without one up to four, each with
        its share of the cores; one where torchrun or srun starts several copies of the command.
    device
        cpu, cuda or mps; auto takes the best there is.
    workers
        Processes that read images, for each job. Default: as the source needs.
    max_minutes
        Stop after so many minutes and exit with 75; --resume continues.
    dry_run
        Write nothing; show the pieces, the cells, the time and the room on the disk that they will take.
    resume
        Start, continue, or help: whatever applies.
    retry_failed
        Try again what failed in an earlier call.
    json
        Also write the rows of the table to this file.

    Returns
    -------
    StudyResult
        `rows()` gives flat records; it prints as tables.

    Raises
    ------
    InputError
        The recipe, the data or the folder cannot be used; found before any work.
    Stopped
        On SIGTERM, SIGUSR1 or at `max_minutes`: --resume continues.
    ResourceError
        The disk is full.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs must be at least 1, not {jobs}.")
    if max_minutes is not None and not max_minutes > 0:
        raise InputError(f"--max-minutes must be above 0, not {max_minutes:g}.")
    where = resolve_device(device)
    values = read_recipe(recipe, size=size, changes=set)
    folder = StudyFolder(out)
    if not dry_run:
        folder.check(resume=resume)
    parsed = parse_recipe(values)
    sources = Sources(parsed.data)
    plan = make_plan(parsed, sources)
    if not dry_run:
        check_precisions(plan.cells, where)
    gpus = torch.cuda.device_count() if where == "cuda" else 0
    count = jobs or (1 if local_place() is not None else gpus or min(4, os.cpu_count() or 1))
    with standing_alone():
        cost = estimate_cost(plan, sources, folder, device=device, threads=max(1, (os.cpu_count() or 1) // count))
    states: Mapping[str, Any] = states_of(plan, folder)
    remarks = _on_lost_products(plan, folder, states)
    if dry_run:
        return StudyResult(out=None, plan=plan, cost=cost, jobs=count, states=states, remarks=remarks)
    check_space(cost, folder, plan, count)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    folder.open(text, plan)
    if retry_failed:
        folder.forget_failures(plan)
    console = Console(stderr=True)
    for note in [*remarks, *plan.notes]:
        console.print(f"Note: {note}", markup=False, highlight=False)
    states = states_of(plan, folder)
    if not all(state in SETTLED for state in states.values()):
        file = write_recipe(folder, text, hashlib.sha256(text.encode()).hexdigest()[:10])
        crew = Crew(
            recipe=file,
            folder=folder,
            plan=plan,
            jobs=min(count, len(plan.pieces)),
            device=device,
            gpus=gpus,
            workers=workers,
            max_minutes=max_minutes,
        )
        with listen_for_stop(max_minutes) as stop:
            states = supervise(crew, stop, cost.seconds)
    findings = collect(plan, folder, parsed)
    write_findings(findings, plan, folder, sources, parsed, command=command_line(recipe, size, set))
    result = StudyResult(out=folder.path, plan=plan, findings=findings, cost=cost, jobs=count, states=dict(states))
    if json is not None:
        atomic_write(json, jsonlib.dumps(result.rows(), indent=1) + "\n")
    return result


def _on_lost_products(plan: Plan, folder: StudyFolder, states: Mapping[str, Any]) -> list[str]:
    """What a person must know where results came without tokenizers and encoders."""
    again, perhaps = remade(plan, folder, states), perhaps_remade(plan, folder, states)
    told = []
    if again:
        names = ", ".join(f"{plan.pieces[i].kind} of {plan.pieces[i].name}" for i in again[:3])
        told.append(
            f"Finished pieces that are made again: {len(again)}, because what is not finished reads their tokenizer or "
            f"encoder, which is not here ({names}{', ...' if len(again) > 3 else ''})."
        )
    if perhaps:
        told.append(
            f"Trainings without their encoder: {len(perhaps)} more, each made again if its learning rate is the one "
            "that is chosen."
        )
    return told


def command_line(recipe: str, size: str | None, changes: Sequence[str]) -> str:
    """The command that makes the study again."""
    import shlex

    words = ["clustermim", "study", recipe]
    words += [] if size is None else ["--size", size]
    words += ["--set", *changes] if changes else []
    return shlex.join([*words, "--out", "DIR"])
