"""The part of a study's page that says whether a score foretold what training found."""

from collections.abc import Sequence
from typing import Any

from clustermim.render.page import Column, Section
from clustermim.render.scatter import Axis, ScatterPoint
from clustermim.studies.answers import CHOICES, Answers, Ranked, main_setting
from clustermim.studies.charts import correlation_chart, facts_of, summaries, widest
from clustermim.studies.collecting import Findings
from clustermim.studies.correlating import FEWEST_RESAMPLED
from clustermim.studies.scores import SCORES
from clustermim.studies.tables import protocol_title
from clustermim.studies.telling import opening, prediction_sentences, where


def add_scores(section: Section, findings: Findings, answers: Answers, pairs: Sequence[tuple[str, str]]) -> None:
    """What was written down before, and how each score ranked the targets."""
    section.paragraph(
        f"{_written(findings)} Spearman's ρ is 1 if a score puts the targets into the order that training finds, 0 if "
        "it knows nothing of it, −1 if it turns it round; scores that promise more when lower are turned first."
    )
    for sentence in prediction_sentences(findings, answers):
        section.paragraph(sentence)
    for data, judged_on in pairs:
        found = widest(answers, data, judged_on, "linear")
        if found:
            section.chart(
                correlation_chart(found),
                description=f"Rank correlation of each score with linear accuracy on {where(data, judged_on)}.",
                caption=f"{opening(where(data, judged_on))}, linear probe, {found[0].scope}: "
                f"{found[0].correlation.cells} targets{_intervals(found)} Grey: scores that need no labels.",
            )
        points = _points(findings, data, judged_on)
        if len(points) > 2:
            have = [s for s in SCORES if any(s.key in point.x for point in points)]
            section.scatter(
                points,
                [Axis(key=s.key, title=s.title) for s in have],
                [Axis(key=p, title=f"{protocol_title(p)}, %", digits=1) for p in _linear_first(findings.protocols)],
                caption=f"Targets on {where(data, judged_on)}: a score before training against accuracy after it. "
                "Hollow: controls, and pixels and features counted as identity tokens.",
            )
    if not answers.ranked:
        section.paragraph(
            "No ranking can be judged: it takes at least three targets that differ in their score and in accuracy."
        )
        return
    ranked = _plainest_first(answers)
    main = [one for one in ranked if one.scope == CHOICES and one.protocol == "linear"]
    _ranked_table(section, main, "Targets that a person would choose among, by linear probe.")
    _ranked_table(section, ranked, "Every set of targets and way to judge.", folded="Every ranking")


def _intervals(found: Sequence[Ranked]) -> str:
    if any(one.correlation.spearman_low is not None for one in found):
        return ", with 95 % bootstrap intervals over targets and seeds."
    return f", too few for intervals, which take {FEWEST_RESAMPLED}."


def _written(findings: Findings) -> str:
    """Whether the predictions came first."""
    begun = sum(p["of_these_pretrainings_had_begun"] for p in findings.predictions)
    if not findings.predictions:
        return "No prediction was written down."
    if begun:
        return (
            f"The rankings were written to `predictions.json` when **{begun} of the pretrainings they speak of had "
            "already begun**, because the recipe has grown: for these they foretell nothing."
        )
    return "Every ranking was written to `predictions.json` before any pretraining that it speaks of began."


def _ranked_table(section: Section, ranked: Sequence[Ranked], says: str, *, folded: str = "") -> None:
    if not ranked:
        return
    several = len({(one.data, one.judged_on) for one in ranked}) > 1
    differ = several or bool(folded)
    best = next((one.regret.best for one in ranked if one.regret is not None), None)
    if not differ:
        says += f" There are {ranked[0].correlation.cells}" + (f", and {best} is the best." if best else ".")
    section.table(
        [
            Column(key="score_title", title="score", kind="text"),
            *([Column(key="where", title="data", kind="text")] if several else []),
            *([Column(key="scope", title="targets", kind="text")] if folded else []),
            *([Column(key="protocol", title="by", kind="text")] if folded else []),
            *([Column(key="cells", title="n", digits=0)] if differ else []),
            Column(key="spearman", title="Spearman", digits=2, low="spearman_low", high="spearman_high"),
            Column(key="kendall", title="Kendall", digits=2, low="kendall_low", high="kendall_high"),
            Column(key="points", title="regret, points", digits=2),
            Column(key="random_points", title="of a random pick", digits=2),
            Column(key="saved", title="compute saved, %", digits=0),
            Column(key="picked", title="picks", kind="text"),
            *([Column(key="best", title="best", kind="text")] if differ else []),
        ],
        [_ranked_row(one.row()) for one in ranked],
        caption=f"{says} Regret: points of accuracy between the best target and the one that the score picks; compute "
        "saved: share of the training of all of them that picking spares.",
        filterable=bool(folded),
        folded=folded,
    )


def _linear_first(protocols: Sequence[str]) -> list[str]:
    return sorted(protocols, key=lambda protocol: protocol != "linear")


def _plainest_first(answers: Answers) -> list[Ranked]:
    """What a person chooses among, by linear probe, stands at the top."""
    return sorted(answers.ranked, key=lambda one: (one.scope != CHOICES, one.protocol != "linear"))


def _ranked_row(row: dict[str, Any]) -> dict[str, Any]:
    saved = row.get("saved")
    more = {"where": where(row["data"], row["judged_on"]), "saved": None if saved is None else 100 * saved}
    return row | more | {"protocol": protocol_title(row["protocol"])}


def _points(findings: Findings, data: str, judged_on: str) -> list[ScatterPoint]:
    runs = [row for row in findings.runs_on(data, judged_on) if row.accuracy]
    names = {row.name for row in main_setting(runs)}
    points = []
    for one in summaries(findings):
        if (one.data, one.judged_on) != (data, judged_on) or one.name not in names:
            continue
        scores = findings.scores_of(one.rows[0])
        token = findings.token(data, one.rows[0].tokens)
        y = {p: (m, *ends) for p in findings.protocols if (m := one.mean(p)) is not None and (ends := one.ends(p))}
        points.append(
            ScatterPoint(
                name=one.name,
                series="pixels and features" if token is None else "controls" if token.control else token.family,
                x={s.key: scores[s.key] for s in SCORES if s.key in scores},
                y=y,
                facts={key: str(value) for key, value in facts_of(one.rows).items()},
                muted=token is None or token.control,
            )
        )
    return points
