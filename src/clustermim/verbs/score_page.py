"""The page of `clustermim tcas --html`: the scores, then which classes and tokens are bad."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from clustermim.render.figures import Point, interval_chart
from clustermim.render.page import Column, Page, Section
from clustermim.render.score_figures import MOST_CLASSES, confusion_chart, learning_chart
from clustermim.scoring.comparing import Comparison
from clustermim.scoring.learning import CurvePoint
from clustermim.scoring.tcas import TokenScore

READINGS = (("tcas", "TCAS, walk"), ("tcas_rows", "TCAS, rows"), ("tcas_cosine", "TCAS, cosine"))


def score_page(
    scores: Mapping[str, TokenScore],
    *,
    data: str,
    controls: Collection[str],
    advice: Sequence[str],
    notes: Sequence[str],
    class_names: Sequence[str] | None,
    curves: Mapping[str, Sequence[CurvePoint]],
    best: str | None = None,
    comparisons: Mapping[str, Mapping[str, Comparison]] | None = None,
) -> str:
    """The page as HTML.

    Parameters
    ----------
    scores
        Name of tokenizer -> score.
    data
        What was scored on.
    controls
        Names that are there for comparison.
    advice, notes
        Sentences.
    class_names
        Name of each label; None to show the numbers.
    curves
        Learning curves; none where they were not asked for.
    best
        The tokenizer that the others are compared with.
    comparisons
        Each tokenizer against each other one, by name and name; none without a bootstrap.
    """
    some = next(iter(scores.values()))
    end = "" if some.alignment_crossfit is None else "_crossfit"
    page = Page(f"Token scores on {data}", lead=advice)
    part = page.section("Scores")
    if notes:
        part.note(*notes)
    part.chart(
        interval_chart(
            [
                Point(
                    name=name,
                    value=getattr(score, f"alignment{end}"),
                    low=getattr(score, f"alignment{end}_low"),
                    high=getattr(score, f"alignment{end}_high"),
                    muted=name in controls,
                )
                for name, score in scores.items()
                # A control at 1 by construction would press all others into a corner.
                if name not in controls or getattr(score, f"alignment{end}") < 0.99
            ],
            x_label="alignment, cross-fitted" if end else "alignment, plug-in",
        ),
        description="Alignment of each tokenizer with its 95 % interval",
        caption="0: tokens independent of class. 1: every token belongs to one class. Bars are 95 % intervals.",
    )
    _score_table(part, scores, controls, end)
    part.paragraph(
        "TCAS = ‖C − I‖² / L² compares a class matrix C with the identity; its C is read in three ways. **Walk**: "
        "class to token to class. **Rows**: products of the tokens' class distributions; it grows with the vocabulary. "
        "**Cosine**: similarity of the classes' token histograms. Cross-fitted figures judge tokens on images that "
        "they were not counted on; plug-in figures do not, and flatter large vocabularies."
    )
    if comparisons and best is not None and len(scores) > 1:
        _comparisons(page.section("Which is better"), best, comparisons, controls)
    if curves:
        _curves(page.section("How many labels are enough"), curves)
    for name, score in scores.items():
        if name not in controls or len(controls) == len(scores):
            _details(page.section(name), score, class_names)
    return page.html()


def _score_table(part: Section, scores: Mapping[str, TokenScore], controls: Collection[str], end: str) -> None:
    def figure(key: str, title: str, best: Any) -> Column:
        return Column(key=key, title=title, low=f"{key}_low", high=f"{key}_high", best=best)

    columns = [
        Column(key="tokenizer", title="Tokenizer", kind="text"),
        Column(key="vocab_size", title="K", digits=0),
        Column(key="used_tokens", title="Used", digits=0),
        figure(f"alignment{end}", "Alignment", "max"),
        figure(f"labelling_error{end}", "Labelling error", "min"),
        *(figure(f"{key}{end}", title, "min") for key, title in READINGS),
        *([Column(key="alignment", title="Alignment, plug-in")] if end else []),
        Column(key="nmi", title="NMI"),
        Column(key="purity", title="Purity"),
        Column(key="perplexity", title="Perplexity", digits=1),
    ]
    muted = [i for i, name in enumerate(scores) if name in controls]
    caption = "All figures but NMI, purity and perplexity are cross-fitted." if end else "All figures are plug-in."
    rows = [{"tokenizer": name} | score.to_dict() for name, score in scores.items()]
    # A figure biased by few images, as the cosine reading is, may lie outside its own interval: that must be said.
    notes = "Small: 95 % intervals, freed of the bias that resampling shows; a figure outside its own is biased so far."
    part.table(columns, rows, caption=f"{caption} {notes} Grey: controls.", muted=muted)


def _comparisons(
    part: Section, best: str, comparisons: Mapping[str, Mapping[str, Comparison]], controls: Collection[str]
) -> None:
    others = [name for name in comparisons if name != best]
    part.table(
        [
            Column(key="tokenizer", title="Tokenizer", kind="text"),
            Column(key="difference", title=f"Alignment beyond {best}", digits=4, low="low", high="high"),
            Column(key="chance", title=f"Probability that {best} is better", digits=2),
        ],
        [{"tokenizer": name} | _against(comparisons[name][best]) for name in others],
        caption="Paired: both are scored on the same resamples of the same images, so what they share cancels. Small: "
        "95 % intervals of the difference. Grey: controls.",
        muted=[i for i, name in enumerate(others) if name in controls],
    )
    if len(others) > 1:
        part.table(
            [
                Column(key="tokenizer", title="Better than:", kind="text"),
                *(Column(key=name, title=name, digits=2) for name in comparisons),
            ],
            [
                {"tokenizer": name} | {other: found.probability for other, found in row.items()}
                for name, row in comparisons.items()
            ],
            caption="Probability that the tokenizer of the row is better than that of the column.",
            muted=[i for i, name in enumerate(comparisons) if name in controls],
            sortable=False,
        )


def _against(comparison: Comparison) -> dict[str, float]:
    return {
        "difference": comparison.difference,
        "low": comparison.low,
        "high": comparison.high,
        "chance": 1 - comparison.probability,
    }


def _curves(part: Section, curves: Mapping[str, Sequence[CurvePoint]]) -> None:
    part.chart(
        learning_chart(
            {
                name: (
                    [p.images for p in points],
                    [p.alignment_crossfit for p in points],
                    [p.alignment_crossfit_min for p in points],
                    [p.alignment_crossfit_max for p in points],
                )
                for name, points in curves.items()
            },
            y_label="alignment, cross-fitted",
        ),
        description="Alignment against the number of labelled images, a line a tokenizer",
        caption="Mean and range over five random draws of that many images. Cross-fitted alignment is what can be "
        "learned from so many images, so it rises until they are enough for the vocabulary.",
    )


def _details(part: Section, score: TokenScore, class_names: Sequence[str] | None) -> None:
    def named(row: Mapping[str, Any]) -> dict[str, Any]:
        keys = ("class", "second_class", "confused_with")
        names = {key: str(row[key]) if class_names is None else class_names[row[key]] for key in keys if key in row}
        return dict(row) | names

    rows = score.class_rows()
    order = [int((score.classes == row["class"]).argmax()) for row in rows]
    walk = score.walk if score.walk_crossfit is None else score.walk_crossfit
    lift = (walk / score.prior)[order][:, order]
    part.chart(
        confusion_chart([named(row)["class"] for row in rows], lift),
        description="How many times more often than chance the tokens of one class lead to another",
        caption="Where the walk class → token → class leads, in multiples of chance (1), worst class first."
        + (f" The {MOST_CLASSES} worst classes." if len(rows) > MOST_CLASSES else ""),
    )
    part.table(
        [
            Column(key="class", title="Class", kind="text"),
            Column(key="share", title="Share"),
            Column(key="stays", title="Walk stays"),
            Column(key="stays_lift", title="times chance"),
            Column(key="confused_with", title="Confused with", kind="text"),
            Column(key="lift", title="times chance"),
        ],
        [named(row) for row in rows],
        caption="Classes, worst first. How often a walk class → token → class comes back, and where else it leads.",
    )
    part.table(
        [
            Column(key="token", title="Token", kind="text"),
            Column(key="patches", title="Patches", digits=0),
            Column(key="class", title="Class", kind="text"),
            Column(key="class_share", title="its share"),
            Column(key="second_class", title="Second", kind="text"),
            Column(key="second_share", title="its share"),
            Column(key="entropy", title="Entropy (nats)"),
            Column(key="error_share", title="Part of error"),
        ],
        [named(row) for row in score.token_rows(limit=20)],
        caption="The 20 tokens that add most to the labelling error.",
    )
