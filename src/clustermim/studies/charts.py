"""The figures of a study, for the page and for papers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from clustermim.render.figures import Band, Point, band_chart, dot_chart, interval_chart
from clustermim.studies.answers import CHOICES, EVERYTHING, Answers, Ranked, Sweep
from clustermim.studies.collecting import Findings, RunRow
from clustermim.studies.scores import Score
from clustermim.studies.tables import protocol_title


@dataclass(frozen=True, kw_only=True)
class CellSummary:
    """A cell judged on one data set, its seeds brought together."""

    data: str
    judged_on: str
    name: str
    rows: Sequence[RunRow]

    def mean(self, protocol: str) -> float | None:
        """Mean accuracy over seeds, in percent."""
        values = [row.accuracy[protocol] for row in self.rows if protocol in row.accuracy]
        return 100 * float(np.mean(values)) if values else None

    def ends(self, protocol: str) -> tuple[float, float] | None:
        """The lowest and highest seed, or of a single one the interval over test images, in percent."""
        held = [row for row in self.rows if protocol in row.accuracy]
        if not held:
            return None
        values = [100 * row.accuracy[protocol] for row in held]
        if len(values) > 1:
            return min(values), max(values)
        low, high = held[0].intervals.get(protocol, (held[0].accuracy[protocol],) * 2)
        return 100 * low, 100 * high


def summaries(findings: Findings) -> list[CellSummary]:
    """All cells, best by linear probe first within each pair of data sets, those without figures last."""
    groups: dict[tuple[str, str, str], list[RunRow]] = {}
    for row in findings.runs:
        groups.setdefault((row.data, row.judged_on, row.name), []).append(row)
    found = [CellSummary(data=d, judged_on=j, name=n, rows=rows) for (d, j, n), rows in groups.items()]
    pairs = list(dict.fromkeys((one.data, one.judged_on) for one in found))
    return sorted(found, key=lambda one: (pairs.index((one.data, one.judged_on)), -(one.mean("linear") or -1.0)))


def accuracy_chart(findings: Findings, data: str, judged_on: str) -> Figure | None:
    """Every target and floor on one pair of data sets."""
    rows: dict[str, dict[str, float]] = {}
    for one in summaries(findings):
        if (one.data, one.judged_on) == (data, judged_on):
            rows[one.name] = {protocol_title(p): v for p in findings.protocols if (v := one.mean(p)) is not None}
    muted = []
    for floor in findings.floors:
        if (floor.data, floor.judged_on) == (data, judged_on) and floor.accuracy:
            rows[floor.name] = {protocol_title(p): 100 * v for p, v in floor.accuracy.items()}
            muted.append(floor.name)
    rows = {name: values for name, values in rows.items() if values}
    if not rows:
        return None
    ordered = dict(sorted(rows.items(), key=lambda item: -max(item[1].values())))
    return dot_chart(ordered, x_label="test accuracy, %", muted=muted)


def score_chart(findings: Findings, data: str, score: Score) -> Figure | None:
    """One score of every tokenizer of a data set, with its interval where it has one; the best at the top."""
    rows = [t for t in findings.tokens if t.data == data and score.key in t.scores]
    points = [
        Point(
            name=t.name,
            value=t.scores[score.key],
            low=t.scores.get(f"{score.key}_low"),
            high=t.scores.get(f"{score.key}_high"),
            muted=t.control,
        )
        for t in sorted(rows, key=lambda t: t.scores[score.key], reverse=score.higher)
    ]
    return interval_chart(points, x_label=score.title) if len(points) > 1 else None


def correlation_chart(ranked: Sequence[Ranked]) -> Figure:
    """Spearman's ρ of each score with its interval; 0 is chance."""
    ordered = sorted(ranked, key=lambda one: -one.correlation.spearman)
    points = [
        Point(
            name=one.score.title,
            value=one.correlation.spearman,
            low=one.correlation.spearman_low,
            high=one.correlation.spearman_high,
            muted=not one.score.labels,
        )
        for one in ordered
    ]
    figure = interval_chart(points, x_label="Spearman's ρ", zero=True)
    axes = figure.axes[0]
    axes.set_xlim(-1.05, 1.05)
    axes.axvline(0, color=axes.spines["bottom"].get_edgecolor(), linewidth=1.2)
    return figure


def sweep_chart(sweep: Sweep) -> Figure:
    """Accuracy along one axis."""
    bands = [
        Band(
            name=name,
            x=[p.x for p in points],
            y=[100 * p.y for p in points],
            low=[100 * p.low for p in points],
            high=[100 * p.high for p in points],
        )
        for name, points in sweep.lines.items()
    ]
    label = "K, tokens in the vocabulary" if sweep.axis == "K" else "share of patches hidden"
    levels = {name: 100 * value for name, value in sweep.levels.items()}
    return band_chart(
        bands, x_label=label, y_label=f"{protocol_title(sweep.protocol)}, %", levels=levels, log=sweep.axis == "K"
    )


def widest(answers: Answers, data: str, judged_on: str, protocol: str) -> list[Ranked]:
    """The correlations without controls, or, where there are too few targets for that, over all."""
    for scope in (CHOICES, EVERYTHING):
        found = [
            one
            for one in answers.ranked
            if (one.data, one.judged_on, one.scope, one.protocol) == (data, judged_on, scope, protocol)
        ]
        if found:
            return found
    return []


def paper_figures(findings: Findings, answers: Answers) -> dict[str, Figure]:
    """Name of the file -> figure."""
    found: dict[str, Figure] = {}
    for data, judged_on in findings.judgements:
        stem = data if data == judged_on else f"{data}-{judged_on}"
        chart = accuracy_chart(findings, data, judged_on)
        if chart is not None:
            found[f"{stem}-accuracy"] = chart
        for protocol in findings.protocols:
            ranked = widest(answers, data, judged_on, protocol)
            if ranked:
                found[f"{stem}-ranking-{protocol}"] = correlation_chart(ranked)
    for sweep in answers.sweeps:
        stem = sweep.data if sweep.data == sweep.judged_on else f"{sweep.data}-{sweep.judged_on}"
        found[f"{stem}-{sweep.axis.replace(' ', '-').lower()}-{sweep.protocol}"] = sweep_chart(sweep)
    return found


def chosen_place(rows: Sequence[RunRow], protocol: str) -> str:
    """Layer and pool that were chosen, of each seed, each once."""
    return ", ".join(dict.fromkeys(row.places[protocol] for row in rows if protocol in row.places))


def facts_of(rows: Sequence[RunRow]) -> Mapping[str, Any]:
    """What else is told of a cell."""
    return {"lr": ", ".join(dict.fromkeys(f"{row.lr:g}" for row in rows if row.lr is not None)), "seeds": len(rows)}
