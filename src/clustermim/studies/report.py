"""The page of a study: the answer first, then what it rests on, each figure with its table."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from clustermim.render.page import Column, Page, Section
from clustermim.render.scatter import Axis, ScatterPoint
from clustermim.studies.answers import (
    CHOICES,
    Answers,
    Ranked,
    floor_sentences,
    headline,
    main_setting,
    pair_sentence,
    prediction_sentences,
)
from clustermim.studies.charts import (
    CellSummary,
    accuracy_chart,
    chosen_place,
    correlation_chart,
    facts_of,
    summaries,
    sweep_chart,
    widest,
)
from clustermim.studies.collecting import Findings
from clustermim.studies.folder import StudyFolder
from clustermim.studies.opening import Sources
from clustermim.studies.recipe import Recipe
from clustermim.studies.report_tokens import add_tokens
from clustermim.studies.scores import SCORES, leading
from clustermim.studies.tables import protocol_title
from clustermim.training.progress import duration


def build_report(
    findings: Findings,
    answers: Answers,
    folder: StudyFolder,
    sources: Sources,
    recipe: Recipe,
    *,
    command: str,
    facts: Mapping[str, Any],
) -> Page:
    """The whole page, in reading order.

    Parameters
    ----------
    findings, answers
        What is told.
    folder, sources, recipe
        The study, for pictures of its tokens and for commands.
    command
        The command line that makes the study again.
    facts
        Versions and hardware.
    """
    page = Page(findings.title, lead=headline(findings, answers))
    pairs = list(dict.fromkeys((row.data, row.judged_on) for row in findings.runs))
    _targets(page.section("Which target to pretrain on"), findings, pairs)
    if any(row.accuracy for row in findings.runs) and any(token.scores for token in findings.tokens):
        _scores(page.section("Did a score foretell it?"), findings, answers, pairs)
    if answers.sweeps:
        _sweeps(page.section("Vocabulary size and mask ratio"), answers)
    if answers.pairs:
        _pairs(page.section("The main comparison"), answers)
    if findings.tokens:
        add_tokens(page.section("Tokens and their scores"), findings, folder, sources, recipe)
    _runs(page.section("Every encoder"), findings)
    if findings.failures:
        _failures(page.section("What failed"), findings)
    _making(page.section("How this was made"), findings, recipe, command, facts)
    return page


def _where(data: str, judged_on: str) -> str:
    return data if data == judged_on else f"{judged_on} after pretraining on {data}"


def _targets(section: Section, findings: Findings, pairs: Sequence[tuple[str, str]]) -> None:
    if findings.failures:
        section.note(
            f"**Pieces of this study that failed: {len(findings.failures)}.** What depends on them is missing below; "
            "the reasons stand under “What failed”."
        )
    if easy := floor_sentences(findings):
        section.note(*easy)
    for data, judged_on in pairs:
        chart = accuracy_chart(findings, data, judged_on)
        if chart is not None:
            section.chart(
                chart,
                description=f"Test accuracy of all targets on {_where(data, judged_on)}; the numbers are in the table.",
                caption=f"Test accuracy on {_where(data, judged_on)}, mean over seeds. Hollow: floors, which no "
                "pretraining has touched. The axis does not begin at zero.",
            )
    score = leading([t.scores for t in findings.tokens])
    cells = summaries(findings)
    section.table(
        [
            Column(key="name", title="target", kind="text"),
            *([Column(key="where", title="judged on", kind="text")] if len(pairs) > 1 else []),
            *(
                Column(key=p, title=f"{protocol_title(p)}, %", digits=1, low=f"{p}_low", high=f"{p}_high", best="max")
                for p in findings.protocols
            ),
            Column(key="score", title=score.title),
            Column(key="seeds", title="seeds", digits=0),
            Column(key="lr", title="learning rate", kind="text"),
            Column(key="place", title="layer.pool", kind="text"),
            Column(key="minutes", title="minutes", digits=1),
            Column(key="reason", title="missing because", kind="text"),
        ],
        [_cell(one, findings, score.key) for one in cells] + _floors(findings),
        caption="Frozen features unless fine-tuned. In brackets the lowest and highest seed, or of a single one the 95 "
        "% interval over test images. Learning rate, layer and pool were chosen on validation images, by the same rule "
        "for every target; minutes are those of all trainings of a target, every learning rate and seed. Best in bold.",
        muted=range(len(cells), len(cells) + len(findings.floors)),
        filterable=True,
    )


def _cell(one: CellSummary, findings: Findings, score: str) -> dict[str, Any]:
    rows = one.rows
    row: dict[str, Any] = {"name": one.name, "where": _where(one.data, one.judged_on), **facts_of(rows)}
    for protocol in findings.protocols:
        row[protocol] = one.mean(protocol)
        row[f"{protocol}_low"], row[f"{protocol}_high"] = one.ends(protocol) or (None, None)
    row["score"] = findings.scores_of(rows[0]).get(score)
    row["place"] = chosen_place(rows, "linear") or None
    row["minutes"] = None if rows[0].cell_seconds is None else rows[0].cell_seconds / 60
    row["reason"] = " ".join(dict.fromkeys(r.reason for r in rows if r.reason)) or None
    return row


def _floors(findings: Findings) -> list[dict[str, Any]]:
    return [
        {
            "name": floor.name,
            "where": _where(floor.data, floor.judged_on),
            "reason": floor.reason or None,
            **{p: 100 * v for p, v in floor.accuracy.items()},
        }
        for floor in findings.floors
    ]


def _scores(section: Section, findings: Findings, answers: Answers, pairs: Sequence[tuple[str, str]]) -> None:
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
                description=f"Rank correlation of each score with linear accuracy on {_where(data, judged_on)}.",
                caption=f"{_where(data, judged_on)}, linear probe, {found[0].scope} ({found[0].correlation.cells}), "
                "with 95 % bootstrap intervals over targets and seeds. Grey: scores that need no labels.",
            )
        points = _points(findings, data, judged_on)
        if len(points) > 2:
            have = [s for s in SCORES if any(s.key in point.x for point in points)]
            section.scatter(
                points,
                [Axis(key=s.key, title=s.title) for s in have],
                [Axis(key=p, title=f"{protocol_title(p)}, %", digits=1) for p in _linear_first(findings.protocols)],
                caption=f"Targets on {_where(data, judged_on)}: a score before training against accuracy after it. "
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
    section.table(
        [
            Column(key="score_title", title="score", kind="text"),
            Column(key="where", title="data", kind="text"),
            *([Column(key="scope", title="targets", kind="text")] if folded else []),
            *([Column(key="protocol", title="by", kind="text")] if folded else []),
            Column(key="cells", title="n", digits=0),
            Column(key="spearman", title="Spearman", digits=2, low="spearman_low", high="spearman_high"),
            Column(key="kendall", title="Kendall", digits=2, low="kendall_low", high="kendall_high"),
            Column(key="points", title="regret, points", digits=2),
            Column(key="random_points", title="of a random pick", digits=2),
            Column(key="saved", title="compute saved, %", digits=0),
            Column(key="picked", title="picks", kind="text"),
            Column(key="best", title="best", kind="text"),
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
    more = {"where": _where(row["data"], row["judged_on"]), "saved": None if saved is None else 100 * saved}
    return row | more | {"protocol": protocol_title(row["protocol"])}


def _points(findings: Findings, data: str, judged_on: str) -> list[ScatterPoint]:
    runs = [row for row in findings.runs if (row.data, row.judged_on) == (data, judged_on) and row.accuracy]
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


def _sweeps(section: Section, answers: Answers) -> None:
    for axis, words in (
        ("K", "Accuracy against the size of the vocabulary. Dotted: targets without a vocabulary."),
        ("mask ratio", "Accuracy against the share of patches that are hidden."),
    ):
        found = [sweep for sweep in answers.sweeps if sweep.axis == axis]
        if not found:
            continue
        section.charts(
            *(
                (
                    sweep_chart(sweep),
                    f"{protocol_title(sweep.protocol)} accuracy on {_where(sweep.data, sweep.judged_on)} against "
                    f"{axis}; the numbers are in the table of every encoder.",
                    f"{_where(sweep.data, sweep.judged_on)}, {protocol_title(sweep.protocol)}. {words} Bands: lowest "
                    "to highest seed, or of a single one the 95 % interval over test images.",
                )
                for sweep in found
            )
        )


def _pairs(section: Section, answers: Answers) -> None:
    for pair in answers.pairs:
        section.paragraph(pair_sentence(pair))
    section.table(
        [
            Column(key="ours", title="target", kind="text"),
            Column(key="theirs", title="against", kind="text"),
            Column(key="where", title="data", kind="text"),
            Column(key="protocol", title="by", kind="text"),
            Column(key="our_accuracy", title="its accuracy, %", digits=1),
            Column(key="their_accuracy", title="the other's, %", digits=1),
            Column(key="points", title="difference, points", digits=1, low="low", high="high"),
            Column(key="pairs", title="paired seeds", digits=0),
            Column(key="chosen_among", title="the other was chosen among", kind="text"),
        ],
        [_pair_row(pair.row()) for pair in answers.pairs],
        caption="Differences over paired seeds, with 95 % intervals by Student's t. Where the other is the better of "
        "several, it was chosen on validation images.",
    )


def _pair_row(row: dict[str, Any]) -> dict[str, Any]:
    more = {"where": _where(row["data"], row["judged_on"]), "protocol": protocol_title(row["protocol"])}
    return row | more | {key: 100 * row[key] for key in ("our_accuracy", "their_accuracy")}


def _runs(section: Section, findings: Findings) -> None:
    rows = []
    for r in findings.runs:
        row: dict[str, Any] = {"name": r.name, "where": _where(r.data, r.judged_on), "seed": r.seed, "lr": r.lr}
        for protocol in findings.protocols:
            row[protocol] = 100 * r.accuracy[protocol] if protocol in r.accuracy else None
            low, high = r.intervals.get(protocol, (None, None))
            row[f"{protocol}_low"], row[f"{protocol}_high"] = (None if e is None else 100 * e for e in (low, high))
        row["validation"] = None if r.validation is None else 100 * r.validation
        row |= {"mask": r.mask_ratio, "model": r.model, "epochs": r.epochs, "minutes": (r.seconds or 0) / 60 or None}
        rows.append(row | {"place": r.places.get("linear"), "reason": r.reason or None})
    section.table(
        [
            Column(key="name", title="target", kind="text"),
            Column(key="where", title="judged on", kind="text"),
            Column(key="seed", title="seed", digits=0),
            *(
                Column(key=p, title=f"{protocol_title(p)}, %", digits=1, low=f"{p}_low", high=f"{p}_high", best="max")
                for p in findings.protocols
            ),
            Column(key="validation", title="validation, %", digits=1),
            Column(key="lr", title="learning rate", digits=5),
            Column(key="place", title="layer.pool", kind="text"),
            Column(key="mask", title="mask", digits=2),
            Column(key="model", title="model", kind="text"),
            Column(key="epochs", title="epochs", digits=0),
            Column(key="minutes", title="minutes", digits=1),
            Column(key="reason", title="missing because", kind="text"),
        ],
        rows,
        caption="One row an encoder. Intervals are over test images; validation is the linear accuracy by which "
        "learning rate and layer were chosen, on training images held back.",
        filterable=True,
    )


def _failures(section: Section, findings: Findings) -> None:
    section.table(
        [
            Column(key="name", title="piece", kind="text"),
            Column(key="kind", title="kind", kind="text"),
            Column(key="reason", title="reason", kind="text"),
        ],
        [dict(one) for one in findings.failures],
        caption="What failed and why. The same command with `--resume --retry-failed` tries these again.",
    )


def _making(section: Section, findings: Findings, recipe: Recipe, command: str, facts: Mapping[str, Any]) -> None:
    if findings.predictions:
        written = ", ".join(f"{p['written']} ({p['data']}, round {p['round']})" for p in findings.predictions)
        section.paragraph(f"Predictions were written at {written}.")
    for note in findings.notes:
        section.paragraph(f"Note: {note}")
    data = " ".join(shlex.quote(entry.source) for entry in recipe.data.values())
    section.commands(
        [
            ("The whole study, which can be stopped and continued with `--resume`:", command),
            ("Look at the plan first:", f"{command} --dry-run"),
            ("Score tokenizers of your own on the same images:", f"clustermim tcas --tokenizer DIR --data {data}"),
        ]
    )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    section.facts(
        {
            "time": f"{duration(findings.seconds)} of all pieces together",
            "hardware": "; ".join(facts["machines"]) or str(facts["hardware"]),
            "versions": versions,
            "source": f"git {facts['git']}" if facts["git"] else "installed package",
            "data": ", ".join(f"{entry.name}: {entry.source}" for entry in recipe.data.values()),
        }
    )
