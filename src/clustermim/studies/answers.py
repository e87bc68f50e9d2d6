"""The questions of a study and their answers: does a score rank targets, and which target wins by how much."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from clustermim.studies.carrying import Carried, carried
from clustermim.studies.collecting import Findings, RunRow, by_cell
from clustermim.studies.correlating import Correlation, Difference, Regret, correlate, paired_difference, regret
from clustermim.studies.scores import SCORES, Score

EVERYTHING = "all targets"
CHOICES = "without controls"
"""What a person would choose among: fitted tokens, neither controls nor pixels that are counted as identity tokens."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """How one score ranked the targets of one scope."""

    data: str
    judged_on: str
    scope: str
    protocol: str
    score: Score
    correlation: Correlation
    regret: Regret | None

    def row(self) -> dict[str, Any]:
        """A flat record."""
        gone = {} if self.regret is None else asdict(self.regret)
        where = {"data": self.data, "judged_on": self.judged_on, "scope": self.scope, "protocol": self.protocol}
        return where | {"score": self.score.key, "score_title": self.score.title} | asdict(self.correlation) | gone


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One target against another over paired seeds."""

    data: str
    judged_on: str
    protocol: str
    ours: str
    theirs: str
    chosen_among: Sequence[str]
    """What `theirs` was chosen among, on validation images."""
    our_accuracy: float
    their_accuracy: float
    difference: Difference
    test_images: int | None = None

    def row(self) -> dict[str, Any]:
        """A flat record."""
        plain = {key: value for key, value in vars(self).items() if key not in ("difference", "chosen_among")}
        return plain | {"chosen_among": ", ".join(self.chosen_among)} | asdict(self.difference)


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """Accuracy at one place of a sweep; the ends are those of the seeds, or of the test interval where there is one."""

    x: float
    y: float
    low: float
    high: float
    seeds: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Accuracy against K or against the mask ratio, a line for each family of targets."""

    data: str
    judged_on: str
    protocol: str
    axis: str
    """`K` or `mask ratio`."""
    lines: Mapping[str, Sequence[SweepPoint]]
    levels: Mapping[str, float] = field(default_factory=dict)
    """Targets that have no place on the axis: name -> accuracy."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Everything that is concluded."""

    ranked: Sequence[Ranked]
    pairs: Sequence[Pair]
    sweeps: Sequence[Sweep]
    carried: Sequence[Carried]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `results.json`."""
        return {
            "correlations": [one.row() for one in self.ranked],
            "pairs": [one.row() for one in self.pairs],
            "sweeps": [asdict(one) for one in self.sweeps],
            "carried": [one.row() for one in self.carried],
        }


def answer(findings: Findings) -> Answers:
    """All answers that the findings allow."""
    ranked, pairs, sweeps = [], [], []
    for data, judged_on in findings.judgements:
        runs = [row for row in findings.runs_on(data, judged_on) if row.accuracy]
        for protocol in findings.protocols:
            judged = [row for row in runs if protocol in row.accuracy]
            ranked += _rank(findings, judged, data, judged_on, protocol)
            pairs += _pairs(findings, judged, data, judged_on, protocol)
            sweeps += _sweeps(findings, judged, data, judged_on, protocol)
    return Answers(ranked=ranked, pairs=pairs, sweeps=sweeps, carried=carried(findings))


def main_setting(runs: Sequence[RunRow]) -> list[RunRow]:
    """The encoders of the setting that most targets share: one model, one number of epochs, one mask ratio."""
    visible = [row for row in runs if row.encoder == "visible"] or list(runs)
    names: dict[tuple[Any, ...], set[str]] = {}
    for row in visible:
        names.setdefault(row.setting, set()).add(row.name)
    if not names:
        return []
    chosen = max(names, key=lambda setting: len(names[setting]))
    return [row for row in visible if row.setting == chosen]


def scopes(findings: Findings, runs: Sequence[RunRow]) -> dict[str, list[RunRow]]:
    """The sets of targets that a ranking is asked for.

    All targets; without controls and pixels; each sweep of K of one family; and at each K that several families have,
    across these families.
    """
    found = {EVERYTHING: list(runs)}
    tokens = {row.name: findings.token(row.data, row.tokens) for row in runs}
    chosen = [row for row in runs if (t := tokens[row.name]) is not None and not t.control]
    found[CHOICES] = chosen
    families: dict[str, set[int | None]] = {}
    sizes: dict[int | None, set[str]] = {}
    for row in chosen:
        t = tokens[row.name]
        assert t is not None
        families.setdefault(t.family, set()).add(t.k)
        sizes.setdefault(t.k, set()).add(t.family)
    for family, ks in families.items():
        if len(ks) > 2:
            found[f"K sweep of {family}"] = [
                r for r in chosen if (t := tokens[r.name]) is not None and t.family == family
            ]
    for k, members in sizes.items():
        if len(members) > 2 and k is not None:
            found[f"across features, K = {k:,}"] = [r for r in chosen if (t := tokens[r.name]) is not None and t.k == k]
    return found


def _rank(findings: Findings, judged: Sequence[RunRow], data: str, judged_on: str, protocol: str) -> list[Ranked]:
    found = []
    for scope, runs in scopes(findings, main_setting(judged)).items():
        accuracies = by_cell(runs, protocol)
        of_cell = {row.name: row for row in runs}
        seconds = {name: row.cell_seconds or 0.0 for name, row in of_cell.items()}
        for score in SCORES:
            values = {
                name: value
                for name, row in of_cell.items()
                if (value := findings.scores_of(row).get(score.key)) is not None
            }
            correlation = correlate(values, accuracies, higher=score.higher)
            if correlation is not None:
                lost = regret(values, accuracies, seconds, higher=score.higher)
                found.append(
                    Ranked(
                        data=data,
                        judged_on=judged_on,
                        scope=scope,
                        protocol=protocol,
                        score=score,
                        correlation=correlation,
                        regret=lost,
                    )
                )
    return found


def _pairs(findings: Findings, judged: Sequence[RunRow], data: str, judged_on: str, protocol: str) -> list[Pair]:
    compare = findings.compare
    if compare is None:
        return []
    found = []
    groups = [compare.theirs, *((name,) for name in compare.also)]
    suffixes = dict.fromkeys(row.name.removeprefix(compare.ours) for row in judged if row.name.startswith(compare.ours))
    for suffix in suffixes:
        ours = {row.seed: row for row in judged if row.name == compare.ours + suffix}
        for group in groups:
            rivals = {name: {row.seed: row for row in judged if row.name == name + suffix} for name in group}
            known = {name: rows for name, rows in rivals.items() if rows}
            if not ours or not known:
                continue
            best = max(known, key=lambda name: float(np.mean([row.validation or 0.0 for row in known[name].values()])))
            mine, their = ({seed: row.accuracy[protocol] for seed, row in rows.items()} for rows in (ours, known[best]))
            gap = paired_difference(mine, their)
            if gap is not None:
                both = sorted(set(mine) & set(their))
                found.append(
                    Pair(
                        data=data,
                        judged_on=judged_on,
                        protocol=protocol,
                        ours=compare.ours + suffix,
                        theirs=best + suffix,
                        chosen_among=group,
                        difference=gap,
                        our_accuracy=float(np.mean([mine[seed] for seed in both])),
                        their_accuracy=float(np.mean([their[seed] for seed in both])),
                        test_images=next(iter(ours.values())).test_images,
                    )
                )
    return found


def _sweeps(findings: Findings, judged: Sequence[RunRow], data: str, judged_on: str, protocol: str) -> list[Sweep]:
    found = []
    main = main_setting(judged)
    by_k: dict[str, dict[str, list[RunRow]]] = {}
    levels: dict[str, list[float]] = {}
    for row in main:
        token = findings.token(row.data, row.tokens)
        if token is not None and token.k is not None and token.kind not in ("identity", "position", "oracle"):
            by_k.setdefault(token.family, {}).setdefault(row.name, []).append(row)
        elif token is None:
            levels.setdefault(row.name, []).append(row.accuracy[protocol])
    lines = {
        family: sorted((_point(findings, rows, protocol, "K") for rows in cells.values()), key=lambda p: p.x)
        for family, cells in by_k.items()
    }
    lines = {family: points for family, points in lines.items() if len(points) > 1}
    if lines:
        means = {name: float(np.mean(values)) for name, values in levels.items()}
        found.append(Sweep(data=data, judged_on=judged_on, protocol=protocol, axis="K", lines=lines, levels=means))
    by_mask: dict[str, dict[float, list[RunRow]]] = {}
    for row in judged:
        if main and _without_mask(row) == _without_mask(main[0]):
            what = row.tokens or row.name.partition("-mask")[0]
            by_mask.setdefault(what, {}).setdefault(row.mask_ratio, []).append(row)
    masks = {
        what: [_point(findings, rows, protocol, "mask ratio") for _, rows in sorted(ratios.items())]
        for what, ratios in by_mask.items()
        if len(ratios) > 1
    }
    if masks:
        found.append(Sweep(data=data, judged_on=judged_on, protocol=protocol, axis="mask ratio", lines=masks))
    return found


def _without_mask(row: RunRow) -> tuple[Any, ...]:
    return (row.model, row.epochs, row.encoder)


def _point(findings: Findings, rows: Sequence[RunRow], protocol: str, axis: str) -> SweepPoint:
    values = [row.accuracy[protocol] for row in rows]
    token = findings.token(rows[0].data, rows[0].tokens)
    x = rows[0].mask_ratio if axis != "K" or token is None or token.k is None else token.k
    low, high = (
        (min(values), max(values)) if len(values) > 1 else rows[0].intervals.get(protocol, (values[0], values[0]))
    )
    return SweepPoint(x=float(x), y=float(np.mean(values)), low=low, high=high, seeds=len(values), name=rows[0].name)
