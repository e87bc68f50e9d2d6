"""The files that a study ends with: results.json and results.csv, figures for papers, and the page."""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from clustermim.render.figures import figure_png, figure_svg
from clustermim.runs import atomic_write, environment_facts
from clustermim.studies.answers import Answers, answer
from clustermim.studies.charts import paper_figures
from clustermim.studies.collecting import Findings
from clustermim.studies.folder import StudyFolder
from clustermim.studies.opening import Sources
from clustermim.studies.pieces import Plan
from clustermim.studies.provenance import makers
from clustermim.studies.recipe import Recipe
from clustermim.studies.report import build_report
from clustermim.studies.telling import headline, plain


def write_findings(
    findings: Findings, plan: Plan, folder: StudyFolder, sources: Sources, recipe: Recipe, *, command: str
) -> Answers:
    """Write everything that a reader may want; each file whole or not at all.

    Parameters
    ----------
    findings, plan, folder, sources, recipe
        The study.
    command
        The command line that makes it again.
    """
    answers = answer(findings)
    facts = environment_facts() | {"makers": makers(plan, folder)}
    told = {
        "title": findings.title,
        "command": command,
        "answer": [plain(line) for line in headline(findings, answers)],
        "made_by": facts,
        "note": recipe.note,
        "seconds_of_all_pieces": round(findings.seconds, 1),
        "notes": list(findings.notes),
        "failures": list(findings.failures),
        "predictions": list(findings.predictions),
        "rows": findings.rows(),
        **answers.to_dict(),
        "recipe": recipe.written,
    }
    atomic_write(folder.path / "results.json", json.dumps(told, indent=1) + "\n")
    atomic_write(folder.path / "results.csv", as_csv(findings.rows()))
    for name, figure in paper_figures(findings, answers).items():
        atomic_write(folder.path / "figures" / f"{name}.png", figure_png(figure))
        atomic_write(folder.path / "figures" / f"{name}.svg", figure_svg(figure))
    page = build_report(findings, answers, plan, folder, sources, recipe, command=command, facts=facts)
    atomic_write(folder.path / "report.html", page.html())
    return answers


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Flat records of several kinds as one table; what a kind lacks is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    plain: list[Mapping[str, Any]] = [{k: "" if v is None else v for k, v in row.items()} for row in rows]
    writer.writerows(plain)
    return text.getvalue()
