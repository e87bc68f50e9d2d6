"""The page of a study: the answer first, then what it rests on, each figure with its table."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from clustermim.render.page import Column, Page, Section
from clustermim.studies.answers import Answers
from clustermim.studies.charts import CellSummary, accuracy_chart, chosen_place, facts_of, summaries, sweep_chart
from clustermim.studies.collecting import Findings
from clustermim.studies.folder import StudyFolder
from clustermim.studies.opening import Sources
from clustermim.studies.pieces import Plan
from clustermim.studies.provenance import machines, revisions, versions
from clustermim.studies.recipe import Recipe
from clustermim.studies.report_runs import add_runs
from clustermim.studies.report_scores import add_scores
from clustermim.studies.report_tokens import add_tokens
from clustermim.studies.scores import leading
from clustermim.studies.steps import step_commands
from clustermim.studies.tables import protocol_title
from clustermim.studies.telling import (
    carried_sentence,
    floor_sentences,
    headline,
    moment,
    opening,
    pair_sentence,
    sweep_sentences,
    where,
)
from clustermim.training.progress import duration


def build_report(
    findings: Findings,
    answers: Answers,
    plan: Plan,
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
    plan, folder, sources, recipe
        The study, for pictures of its tokens and for commands.
    command
        The command line that makes the study again.
    facts
        Versions, hardware and git revision of who draws the page, and of who finished the pieces under ``"makers"``.
    """
    page = Page(findings.title, lead=headline(findings, answers))
    pairs = findings.judgements
    _targets(page.section("Which target to pretrain on"), findings, recipe, pairs)
    if any(row.accuracy for row in findings.runs) and any(token.scores for token in findings.tokens):
        add_scores(page.section("Did a score foretell it?"), findings, answers, pairs)
    if answers.sweeps:
        axes = {"K": "vocabulary size", "mask ratio": "mask ratio"}
        swept = [words for axis, words in axes.items() if any(sweep.axis == axis for sweep in answers.sweeps)]
        _sweeps(page.section(opening(" and ".join(swept))), findings, answers)
    if answers.pairs:
        _pairs(page.section("The main comparison"), answers)
    if answers.carried:
        _carried(page.section("What carries over"), answers)
    if findings.tokens:
        add_tokens(page.section("Tokens and their scores"), findings, folder, sources, recipe)
    add_runs(page.section("Every encoder"), findings, folder)
    if findings.failures:
        _failures(page.section("What failed"), findings)
    if commands := step_commands(plan, findings, recipe):
        section = page.section("Each step on images of your own")
        source = next(iter(recipe.data.values())).source
        section.paragraph(
            "A study strings the other commands together. These do each step alone. Put your own folder in the place "
            f"of `{source}`, and leave out patch size and model to get defaults that suit it."
        )
        section.commands(commands)
    _making(page.section("How this was made"), findings, recipe, command, facts)
    return page


def _targets(section: Section, findings: Findings, recipe: Recipe, pairs: Sequence[tuple[str, str]]) -> None:
    if findings.failures:
        section.note(
            f"**Pieces of this study that failed: {len(findings.failures)}.** What depends on them is missing below; "
            "the reasons stand under “What failed”."
        )
    easy, above = floor_sentences(findings)
    if easy:
        section.note(*easy)
    for text in [*([recipe.note] if recipe.note else []), *above]:
        section.paragraph(text)
    for data, judged_on in pairs:
        chart = accuracy_chart(findings, data, judged_on)
        if chart is not None:
            section.chart(
                chart,
                description=f"Test accuracy of all targets on {where(data, judged_on)}; the numbers are in the table.",
                caption=f"Test accuracy on {where(data, judged_on)}, mean over seeds. Hollow: floors, which no "
                "pretraining has touched. The axis does not begin at zero.",
            )
    score = leading([t.scores for t in findings.tokens])
    cells, floors = summaries(findings), _floors(findings)
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
            Column(key="minutes", title="minutes", digits=1, optional=True),
            Column(key="reason", title="missing because", kind="text", optional=True),
        ],
        [_cell(one, findings, score.key) for one in cells] + floors,
        caption="Frozen features unless fine-tuned. In brackets the lowest and highest seed, or of a single one the 95 "
        "% interval over test images. Learning rate, layer and pool were chosen on validation images, by the same rule "
        "for every target; minutes are those of all trainings of a target, every learning rate and seed. Best encoder "
        "in bold; floors, in grey, do not compete. Targets without tokens have the score of `identity` tokens.",
        muted=range(len(cells), len(cells) + len(floors)),
        filterable=True,
    )


def _cell(one: CellSummary, findings: Findings, score: str) -> dict[str, Any]:
    rows = one.rows
    row: dict[str, Any] = {"name": one.name, "where": where(one.data, one.judged_on), **facts_of(rows)}
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
            "where": where(floor.data, floor.judged_on),
            "reason": floor.reason or None,
            **{p: 100 * v for p, v in floor.accuracy.items()},
        }
        for floor in findings.floors_once
    ]


def _sweeps(section: Section, findings: Findings, answers: Answers) -> None:
    for axis, words in (
        ("K", "Accuracy against the size of the vocabulary. Broken lines: targets without a vocabulary."),
        ("mask ratio", "Accuracy against the share of patches that are hidden."),
    ):
        found = [sweep for sweep in answers.sweeps if sweep.axis == axis]
        if not found:
            continue
        for sweep in found:
            for sentence in sweep_sentences(findings, sweep):
                section.paragraph(sentence)
        section.charts(
            *(
                (
                    sweep_chart(sweep),
                    f"{protocol_title(sweep.protocol)} accuracy on {where(sweep.data, sweep.judged_on)} against "
                    f"{axis}; the numbers are in the table of every encoder.",
                    f"{opening(where(sweep.data, sweep.judged_on))}, {protocol_title(sweep.protocol)}. {words} Bands: "
                    "lowest to highest seed, or of a single one the 95 % interval over test images.",
                )
                for sweep in found
            )
        )


def _carried(section: Section, answers: Answers) -> None:
    for one in answers.carried:
        section.paragraph(carried_sentence(one))
    section.table(
        [
            Column(key="data", title="pretrained on", kind="text"),
            Column(key="judged_on", title="judged on", kind="text"),
            Column(key="way", title="by", kind="text"),
            Column(key="spearman", title="Spearman", low="spearman_low", high="spearman_high", digits=2),
            Column(key="kendall", title="Kendall", low="kendall_low", high="kendall_high", digits=2),
            Column(key="cost", title="cost, points", low="cost_low", high="cost_high", digits=1),
        ],
        [one.row() | {"way": protocol_title(one.protocol)} for one in answers.carried],
        caption="Rank correlation of the targets' accuracies on their own data with those on the other. Cost: how far "
        "encoders lie below those of the same target that were pretrained on the data they are judged on, mean over "
        "targets, in brackets the lowest and the highest target.",
    )


def _pairs(section: Section, answers: Answers) -> None:
    for pair in answers.pairs:
        section.paragraph(pair_sentence(pair))
    several = len({(pair.data, pair.judged_on) for pair in answers.pairs}) > 1
    section.table(
        [
            Column(key="ours", title="target", kind="text"),
            Column(key="theirs", title="against", kind="text"),
            *([Column(key="where", title="data", kind="text")] if several else []),
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
    more = {"where": where(row["data"], row["judged_on"]), "protocol": protocol_title(row["protocol"])}
    return row | more | {key: 100 * row[key] for key in ("our_accuracy", "their_accuracy")}


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
        written = ", ".join(f"{moment(p['written'])} ({p['data']}, round {p['round']})" for p in findings.predictions)
        section.paragraph(f"Predictions were written on {written}.")
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
    found, revision = facts["makers"], revisions(facts["makers"])
    drawn = f"; this page: {facts['git']}" if facts["git"] and facts["git"] != revision else ""
    section.facts(
        {
            "time": f"{duration(findings.seconds)} of all pieces together",
            "hardware": "; ".join(machines(found)),
            "versions": versions(found),
            **({"git revision of the working folder": revision + drawn} if revision else {}),
            "data": ", ".join(f"{entry.name}: {entry.source}" for entry in recipe.data.values()),
        }
    )
