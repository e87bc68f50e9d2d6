"""What a study prints: tokenizers, encoders, how each score ranked them, what failed."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustermim.evaluation.protocols import PROTOCOLS
from clustermim.studies.answers import CHOICES, EVERYTHING, Answers, answer
from clustermim.studies.collecting import FINETUNED, Findings
from clustermim.studies.scores import SCORES, leading
from clustermim.studies.telling import headline, plain

_ROOM = 8  # columns that a terminal has room for


def protocol_title(protocol: str) -> str:
    """The name of a column of accuracies."""
    return "fine-tuned" if protocol == FINETUNED else PROTOCOLS[protocol].title


def findings_tables(findings: Findings) -> Group:
    """Tables for the terminal, the answer last."""
    answers = answer(findings)
    parts: list[RenderableType] = [_encoders(findings)]
    if answers.ranked:
        parts.append(_correlations(findings, answers))
    parts += [
        Text(f"failed: {one['kind']} of {one['name']}: {one['reason']}", style="red") for one in findings.failures
    ]
    parts += [Text(f"Note: {note}", style="yellow") for note in findings.notes]
    parts += [Text(plain(line), style="bold") for line in headline(findings, answers)]
    return Group(*parts)


def _encoders(findings: Findings) -> Table:
    score = leading([t.scores for t in findings.tokens])
    table = Table(title=f"{findings.title}: test accuracy in %", title_justify="left")
    several = len(findings.judgements) > 1
    for title in (["data"] if several else []) + ["target"]:
        table.add_column(title, no_wrap=True)
    for title in ("seed", score.title, "lr", "validation", *map(protocol_title, findings.protocols)):
        table.add_column(title, justify="right")
    reasons = [row.reason for row in findings.runs] + [floor.reason for floor in findings.floors]
    told = any(reasons + [token.reason for token in findings.tokens])
    if told:
        table.add_column("")
    for row in findings.runs:
        value = findings.scores_of(row).get(score.key)
        cells = [
            *([_arrow(row.data, row.judged_on)] if several else []),
            row.name,
            str(row.seed),
            "" if value is None else f"{value:z.3f}",
            "" if row.lr is None else f"{row.lr:g}",
            "" if row.validation is None else f"{100 * row.validation:.1f}",
            *(f"{100 * row.accuracy[p]:.1f}" if p in row.accuracy else "–" for p in findings.protocols),
            *([row.reason] if told else []),
        ]
        table.add_row(*cells, style="red" if row.reason else None)
    table.add_section()
    for floor in findings.floors_once:
        cells = [*([_arrow(floor.data, floor.judged_on)] if several else []), floor.name, "", "", "", ""]
        cells += [f"{100 * floor.accuracy[p]:.1f}" if p in floor.accuracy else "–" for p in findings.protocols]
        table.add_row(*cells, *([floor.reason] if told else []), style="dim")
    trained = {row.tokens for row in findings.runs}
    for token in findings.tokens:
        if token.name not in trained:
            value = token.scores.get(score.key)
            shown = "" if value is None else f"{value:z.3f}"
            cells = [*([token.data] if several else []), f"{token.name}, scored only", "", shown, "", ""]
            cells += ["" for _ in findings.protocols]
            table.add_row(*cells, *([token.reason] if told else []), style="dim")
    return table


def _correlations(findings: Findings, answers: Answers) -> Table:
    """Spearman of each score by protocol, for the two widest scopes; of many judgements by the main one of each."""
    table = Table(title="How each score ranked the targets (Spearman, positive is right)", title_justify="left")
    table.add_column("score", no_wrap=True)
    keys: Sequence[tuple[str, str, str, str]] = list(
        dict.fromkeys(
            (r.data, r.judged_on, r.scope, r.protocol) for r in answers.ranked if r.scope in (EVERYTHING, CHOICES)
        )
    )
    if len(keys) > _ROOM:
        keys = [key for key in keys if key[2:] == (CHOICES, "linear")]
    for data, judged_on, scope, protocol in keys:
        table.add_column(f"{_arrow(data, judged_on)}, {scope}, {protocol_title(protocol)}", justify="right")
    for score in SCORES:
        found = {(r.data, r.judged_on, r.scope, r.protocol): r for r in answers.ranked if r.score == score}
        cells = [f"{found[key].correlation.spearman:+.2f}" if key in found else "" for key in keys]
        if any(cells):
            table.add_row(score.title, *cells)
    return table


def _arrow(data: str, judged_on: str) -> str:
    return data if data == judged_on else f"{data} → {judged_on}"
