"""What a study found, gathered from its folder: tokenizers with scores, encoders with accuracies, and what failed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from clustermim.errors import InputError
from clustermim.studies.choosing import choose_trial
from clustermim.studies.folder import State, StudyFolder
from clustermim.studies.pieces import Cell, Plan, Run
from clustermim.studies.recipe import CompareSettings, Recipe
from clustermim.studies.scores import BY_KEY
from clustermim.studies.states import states_of, why

FINETUNED = "finetune"


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One tokenizer on one data set."""

    data: str
    name: str
    family: str
    kind: str
    control: bool
    k: int | None
    patch_size: int
    round: int
    scores: Mapping[str, float] = field(default_factory=dict)
    """By key of `scores.SCORES`; of the leading ones also `_low` and `_high`."""
    used_tokens: int | None = None
    seconds: float | None = None
    """Of fit and score."""
    fit: str = ""
    """Its piece."""
    reason: str = ""
    """Why there are no scores."""


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One encoder: a target on a data set with one seed, judged on one data set."""

    data: str
    judged_on: str
    name: str
    family: str
    tokens: str | None
    scored_as: str | None
    seed: int
    setting: tuple[Any, ...]
    """Equal for encoders that are compared as targets."""
    mask_ratio: float
    model: str
    epochs: int
    encoder: str
    lr: float | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)
    """Protocol -> test accuracy in [0, 1]."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    validation: float | None = None
    """Linear accuracy on validation images."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Protocol -> layer and pool."""
    seconds: float | None = None
    """Of its pretraining alone."""
    cell_seconds: float | None = None
    """Of all pretrainings of its cell: every learning rate and seed."""
    run: str | None = None
    test_images: int | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class FloorRow:
    """What no pretraining achieves."""

    data: str
    judged_on: str
    name: str
    accuracy: Mapping[str, float] = field(default_factory=dict)
    of_tokens: bool = False
    """Whether it rests on tokens that were fitted on `data`; else on nothing but what is judged."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that a study found."""

    title: str
    tokens: Sequence[TokenRow]
    runs: Sequence[RunRow]
    floors: Sequence[FloorRow]
    failures: Sequence[Mapping[str, str]]
    """`kind`, `name`, `reason` of each piece that failed."""
    protocols: Sequence[str]
    compare: CompareSettings | None
    notes: Sequence[str]
    predictions: Sequence[Mapping[str, Any]]
    seconds: float
    """Of all finished pieces together."""

    @property
    def judgements(self) -> list[tuple[str, str]]:
        """Data that was trained on, with data that the encoders were judged on: each pair once."""
        return list(dict.fromkeys((row.data, row.judged_on) for row in self.runs))

    def runs_on(self, data: str, judged_on: str) -> list[RunRow]:
        """The encoders of one such pair."""
        return [row for row in self.runs if (row.data, row.judged_on) == (data, judged_on)]

    @property
    def floors_once(self) -> list[FloorRow]:
        """The floors without repetitions: one that rests on no tokens is the same whatever was pretrained on."""
        once = [floor if floor.of_tokens else replace(floor, data=floor.judged_on) for floor in self.floors]
        return list({(floor.data, floor.judged_on, floor.name): floor for floor in once}.values())

    def scores_of(self, row: RunRow) -> Mapping[str, float]:
        """The scores that speak of what an encoder predicts; none where nothing was scored."""
        return next((t.scores for t in self.tokens if t.data == row.data and t.name == row.scored_as), {})

    def token(self, data: str, name: str | None) -> TokenRow | None:
        """A tokenizer by name."""
        return next((t for t in self.tokens if t.data == data and t.name == name), None)

    def rows(self) -> list[dict[str, Any]]:
        """Flat records for files: tokenizers, encoders, floors."""
        found: list[dict[str, Any]] = []
        for t in self.tokens:
            plain = {k: v for k, v in vars(t).items() if k not in ("scores", "fit")}
            found.append({"row": "tokenizer", **plain, **t.scores})
        for r in self.runs:
            plain = {k: v for k, v in vars(r).items() if k not in ("setting", "accuracy", "intervals", "places")}
            ends = {
                f"{p}_{end}": v for p, pair in r.intervals.items() for end, v in zip(("low", "high"), pair, strict=True)
            }
            chosen = {f"{p}_layer": place for p, place in r.places.items()}
            scored = {key: value for key, value in self.scores_of(r).items() if key in BY_KEY}
            found.append({"row": "encoder", **plain, **r.accuracy, **ends, **chosen, **scored})
        for f in self.floors_once:
            plain = {k: v for k, v in vars(f).items() if k not in ("accuracy", "of_tokens")}
            found.append({"row": "floor", **plain, **f.accuracy})
        return found


def by_cell(runs: Sequence[RunRow], protocol: str) -> dict[str, list[float]]:
    """Name of the cell -> accuracy of each seed."""
    found: dict[str, list[float]] = {}
    for row in runs:
        if protocol in row.accuracy:
            found.setdefault(row.name, []).append(row.accuracy[protocol])
    return found


def test_images_of(rows: Sequence[RunRow]) -> int | None:
    """On how many images encoders that are judged on the same data were judged; None where none was."""
    return next((row.test_images for row in rows if row.test_images), None)


def collect(plan: Plan, folder: StudyFolder, recipe: Recipe) -> Findings:
    """Read what there is; what is missing is there with its reason."""
    states = states_of(plan, folder)
    predictions = [folder.result(i) for i, p in plan.pieces.items() if p.kind == "predict" and states[i] == "done"]
    failures = [
        {"kind": plan.pieces[i].kind, "name": plan.pieces[i].name, "reason": why(plan, folder, states, i)}
        for i, state in states.items()
        if state == "failed"
    ]
    gatherer = _Gatherer(plan, folder, states)
    return Findings(
        title=recipe.title,
        tokens=gatherer.tokens(),
        runs=[row for cell in plan.cells for row in gatherer.runs(cell)],
        floors=gatherer.floors(),
        failures=failures,
        protocols=[*recipe.protocols, *([FINETUNED] if recipe.finetune else [])],
        compare=recipe.compare,
        notes=plan.notes,
        predictions=predictions,
        seconds=sum(gatherer.seconds(i) for i, state in states.items() if state == "done"),
    )


class _Gatherer:
    def __init__(self, plan: Plan, folder: StudyFolder, states: Mapping[str, State]) -> None:
        self.plan, self.folder, self.states = plan, folder, states
        self._records: dict[str, dict[str, Any]] = {}

    def record(self, identity: str) -> dict[str, Any]:
        """Read once."""
        if identity not in self._records:
            self._records[identity] = self.folder.record(identity)
        return self._records[identity]

    def seconds(self, identity: str) -> float:
        return float(self.record(identity)["seconds"]) if self.states[identity] == "done" else 0.0

    def why(self, identity: str) -> str:
        return why(self.plan, self.folder, self.states, identity)

    def tokens(self) -> list[TokenRow]:
        rows = []
        for one in self.plan.tokens:
            facts: dict[str, Any] = {
                "data": one.data,
                "name": one.name,
                "family": one.family,
                "kind": one.kind,
                "control": one.control,
                "k": one.settings.get("k"),
                "patch_size": one.patch_size,
                "round": one.round,
                "fit": one.fit,
            }
            if self.states[one.score] != "done":
                rows.append(TokenRow(**facts, reason=self.why(one.score)))
                continue
            found = self.record(one.score)["result"]
            scores = {
                key: float(value)
                for key, value in found.items()
                if key.removesuffix("_low").removesuffix("_high") in BY_KEY and isinstance(value, int | float)
            }
            facts["k"] = found.get("vocab_size", facts["k"])
            seconds = self.seconds(one.fit) + self.seconds(one.score)
            rows.append(TokenRow(**facts, scores=scores, used_tokens=found.get("used_tokens"), seconds=seconds))
        return rows

    def runs(self, cell: Cell) -> list[RunRow]:
        every = [t.pretrain for t in cell.trials] + [r.pretrain for r in cell.runs if r.pretrain is not None]
        spent = sum(self.seconds(identity) for identity in every) or None
        rows = []
        for run in cell.runs:
            for judge in run.probe or {cell.data: ""}:
                facts: dict[str, Any] = {
                    "data": cell.data,
                    "judged_on": judge,
                    "name": cell.name,
                    "family": cell.family,
                    "tokens": cell.tokens,
                    "scored_as": cell.scored_as,
                    "seed": run.seed,
                    "setting": cell.setting,
                    "mask_ratio": float(cell.settings["mask_ratio"]),
                    "model": cell.settings["model"],
                    "epochs": int(cell.settings["epochs"]),
                    "encoder": cell.settings["encoder"],
                    "cell_seconds": spent,
                }
                rows.append(self._run(cell, run, judge, facts))
        return rows

    def _run(self, cell: Cell, run: Run, judge: str, facts: dict[str, Any]) -> RunRow:
        probe = run.probe.get(judge)
        if probe is None:
            return self._unjudged(cell, run, facts)
        if self.states[probe] != "done":
            return RunRow(**facts, reason=self.why(probe))
        found = self.record(probe)["result"]
        rows = {row["protocol"]: row for row in found["rows"]}
        if run.finetune is not None and self.states[run.finetune] == "done" and judge == next(iter(run.probe)):
            rows[FINETUNED] = self.record(run.finetune)["result"]["rows"][0]
        return RunRow(
            **facts,
            lr=found["lr"],
            accuracy={name: row["top1"] for name, row in rows.items()},
            intervals={name: (row["top1_low"], row["top1_high"]) for name, row in rows.items()},
            places={n: f"{row['layer']}.{row['pool']}" for n, row in rows.items() if "layer" in row},
            validation=self._validation(cell, run, judge, found["run"]),
            seconds=self.seconds(found["run"]),
            run=found["run"],
            test_images=max(row["n_test"] for row in found["rows"]),
            reason="" if run.finetune is None or self.states[run.finetune] == "done" else self.why(run.finetune),
        )

    def _validation(self, cell: Cell, run: Run, judge: str, identity: str) -> float | None:
        """What the chosen run reached on the validation images of the data set that it is judged on."""
        select = run.select.get(judge) or next(
            (t.select.get(judge) for t in cell.trials if t.pretrain == identity), None
        )
        if select is None or self.states[select] != "done":
            return None
        return float(max(self.record(select)["result"]["validation"]["linear"].values()))

    def _unjudged(self, cell: Cell, run: Run, facts: dict[str, Any]) -> RunRow:
        """A run on images without labels."""
        if run.pretrain is not None and self.states[run.pretrain] == "done":
            return RunRow(
                **facts,
                lr=self.record(run.pretrain)["result"]["lr"],
                seconds=self.seconds(run.pretrain),
                run=run.pretrain,
            )
        if run.pretrain is None:
            try:
                choice = choose_trial(self.plan, self.folder, tuple(t.pretrain for t in cell.trials))
            except InputError as problem:
                return RunRow(**facts, reason=f"{problem} {self.why(cell.trials[0].pretrain)}")
            return RunRow(**facts, lr=choice.lr, seconds=self.seconds(choice.pretrain), run=choice.pretrain)
        return RunRow(**facts, reason=self.why(run.pretrain))

    def floors(self) -> list[FloorRow]:
        rows = []
        for floor in self.plan.floors:
            for judge, identity in floor.probe.items():
                of_tokens = bool(self.plan.pieces[identity].needs)
                found = FloorRow(data=floor.data, judged_on=judge, name=floor.name, of_tokens=of_tokens)
                if self.states[identity] != "done":
                    rows.append(replace(found, reason=self.why(identity)))
                    continue
                accuracy = {row["protocol"]: row["top1"] for row in self.record(identity)["result"]["rows"]}
                rows.append(replace(found, accuracy=accuracy))
        return rows
