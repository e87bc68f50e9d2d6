"""The demo's table and its page: what came out, the tokens, their scores, the training, each step as a command."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from clustermim.render.figures import Curve, Point, dot_chart, interval_chart, loss_curves
from clustermim.render.page import Column, Page, Section
from clustermim.verbs.demo_findings import (
    PROTOCOLS,
    Judged,
    answer,
    floor_findings,
    predicted_order,
    prediction_findings,
)
from clustermim.verbs.token_views import TokenView
from clustermim.verbs.tokenizer_show import add_maps, add_vocabulary


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One tokenizer and its scores."""

    name: str
    control: bool
    vocab_size: int
    used_tokens: int
    alignment: float
    """Plug-in."""
    alignment_crossfit: float
    alignment_low: float | None
    """Of the cross-fitted alignment's 95 % interval."""
    alignment_high: float | None
    labelling_error_crossfit: float
    nmi: float
    perplexity: float
    tcas_crossfit: float


@dataclass(frozen=True, kw_only=True)
class Story:
    """Everything that the page tells."""

    scored: Sequence[Scored]
    judged: Sequence[Judged]
    chosen: str
    """Name of the vocabulary that is shown and was chosen by its score."""
    curves: Sequence[Curve]
    simple: TokenView = field(repr=False)
    """The plain vocabulary that shows what a token is."""
    simple_name: str
    view: TokenView = field(repr=False)
    """The chosen vocabulary."""
    commands: Sequence[tuple[str, str]]
    facts: Mapping[str, str]
    train_images: int
    test_images: int
    epochs: int


def rich_table(scored: Sequence[Scored], judged: Sequence[Judged], chosen: str) -> Table:
    """One table, 80 columns wide: what was trained, the floors, and the tokenizers behind them."""
    table = Table(
        title="Tokens scored before training, encoders judged after it (test accuracy in %)", title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for column in ("alignment, 95 %", "foreseen", "k-NN", "linear"):
        table.add_column(column, justify="right", no_wrap=True)
    order = predicted_order(judged)
    for floor in (False, True):
        table.add_section()
        table.add_row("[bold]Floors[/]" if floor else "[bold]Pretrained encoders[/]")
        for j in judged:
            if j.floor == floor:
                cells = [f"{100 * j.accuracy[p]:.1f}" if p in j.accuracy else "–" for p in PROTOCOLS]
                place = f"{order.index(j.name) + 1}." if j.name in order else ""
                table.add_row(j.name, "" if j.alignment is None else f"{j.alignment:z.3f}", place, *cells)
    for control in (False, True):
        table.add_section()
        table.add_row("[bold]Controls[/]" if control else "[bold]Tokens[/]")
        for s in scored:
            if s.control == control:
                ends = "" if s.alignment_low is None else f" [{s.alignment_low:z.3f}, {s.alignment_high:z.3f}]"
                name = f"{s.name}, chosen" if s.name == chosen else s.name
                table.add_row(name, escape(f"{s.alignment_crossfit:z.3f}{ends}"))
    return table


def build_page(story: Story) -> Page:
    """The whole page, in reading order."""
    page = Page("ClusterMIM on handwritten digits", lead=answer(story.judged, story.test_images))
    _results(page.section("What came out"), story)
    _tokens(page.section("Patches become tokens"), story)
    _scores(page.section("Tokens scored before training"), story)
    _training(page.section("Training"), story)
    _predictions(page.section("Did the score foresee it?"), story)
    section = page.section("Each step alone")
    section.paragraph(
        "The demo only strings the verbs together. These commands do each step by itself; put your own folder in the "
        "place of `digits` and leave out the patch size and model to get defaults that suit it."
    )
    section.commands(story.commands)
    page.section("How this was made").facts(story.facts)
    return page


def _results(section: Section, story: Story) -> None:
    section.note(*floor_findings(story.judged, story.test_images))
    section.paragraph(
        "An illustration, not evidence: one seed, few epochs, and a batch size and budget that were settled while "
        "accuracies on these same test images could be seen. Draw no conclusion about the methods from this table."
    )
    rows = [_judged_row(j, predicted_order(story.judged)) for j in story.judged]
    section.table(
        [
            Column(key="name", title="encoder", kind="text"),
            Column(key="knn", title="k-NN, %", digits=1, best="max"),
            Column(key="linear", title="linear, %", digits=1, best="max"),
            Column(key="alignment", title="alignment of its targets"),
            Column(key="kind", title="what it is", kind="text"),
        ],
        rows,
        caption=f"Test accuracy of frozen features on {story.test_images} images that no step has seen. Best in bold; "
        "floors in grey are there for comparison: they have learned nothing, or only clustered patches.",
        muted=[i for i, j in enumerate(story.judged) if j.floor and not _wins(j, story.judged)],
    )
    chart = {j.name: {PROTOCOLS[p]: 100 * v for p, v in j.accuracy.items()} for j in story.judged}
    section.chart(
        dot_chart(chart, x_label="test accuracy, %", muted=[j.name for j in story.judged if j.floor]),
        description="Test accuracy of each encoder by k-NN and linear probe; the numbers are in the table.",
        caption="Filled: trained. Hollow: floors. The axis does not begin at zero.",
    )


def _wins(floor: Judged, judged: Sequence[Judged]) -> bool:
    """Whether a floor is best by some protocol: then it competes for the bold face."""
    return any(floor.accuracy.get(p, 0.0) >= max(j.accuracy.get(p, 0.0) for j in judged) for p in PROTOCOLS)


def _judged_row(judged: Judged, order: Sequence[str]) -> dict[str, Any]:
    kinds = {"token": f"ViT trained on masked tokens of {judged.tokens}", "pixel": "ViT trained on masked pixels"}
    return {
        "name": judged.name,
        "kind": kinds.get(judged.masked or "", "floor"),
        "alignment": judged.alignment,
        "foreseen": order.index(judged.name) + 1 if judged.name in order else None,
        **{protocol: 100 * value for protocol, value in judged.accuracy.items()},
    }


def _tokens(section: Section, story: Story) -> None:
    rows, columns = story.view.maps[0].ids.shape
    section.paragraph(
        f"Each scan is cut into {rows} × {columns} patches. K-means groups the patches of the {story.train_images:,} "
        f"training images; a patch's group is its **token**, and the mean of the group its picture. The simplest "
        f"vocabulary, `{story.simple_name}`, describes a patch by its pixels alone:"
    )
    add_maps(section, story.simple)
    add_vocabulary(section, story.simple)
    if story.chosen == story.simple_name:
        return
    section.paragraph(
        f"Here is `{story.chosen}`, the vocabulary that the scores below choose; {story.view.used} of its "
        f"{story.view.vocab_size} tokens are in use, as many as {story.view.perplexity:.0f} in even use."
    )
    add_maps(section, story.view)
    add_vocabulary(section, story.view, folded=f"All tokens of {story.chosen}")


def _scores(section: Section, story: Story) -> None:
    section.paragraph(
        "How well do tokens line up with classes? **Alignment** is 0 if tokens say nothing about the class and 1 if "
        "every token belongs to one class. It is cross-fitted: counted on some images, checked on others, so that a "
        "large vocabulary is not flattered. Nothing has been trained yet."
    )
    ranked = sorted(story.scored, key=lambda s: -s.alignment_crossfit)
    section.chart(
        interval_chart(
            [
                Point(
                    name=s.name,
                    value=s.alignment_crossfit,
                    low=s.alignment_low,
                    high=s.alignment_high,
                    muted=s.control,
                )
                for s in ranked
            ],
            x_label="alignment, cross-fitted, with 95 % interval",
        ),
        description="Cross-fitted alignment of each tokenizer with its interval; the numbers are in the table.",
        caption="Grey: controls that bracket every result, from tokens that say nothing to one that knows the label.",
    )
    section.table(
        [
            Column(key="name", title="tokenizer", kind="text"),
            Column(key="vocab_size", title="K", digits=0),
            Column(key="alignment_crossfit", title="alignment", low="alignment_low", high="alignment_high", best="max"),
            Column(key="alignment", title="plug-in"),
            Column(key="labelling_error_crossfit", title="labelling error", best="min"),
            Column(key="tcas_crossfit", title="TCAS (walk)", best="min", digits=4),
            Column(key="nmi", title="NMI, plug-in", best="max"),
            Column(key="used_tokens", title="used", digits=0),
            Column(key="perplexity", title="perplexity", digits=1),
        ],
        [vars(s) for s in ranked],
        caption=f"Scores on the {story.train_images:,} training images, cross-fitted unless called plug-in, with 95 % "
        "bootstrap intervals. Alignment: higher is better. Labelling error and TCAS: lower is better.",
        muted=[i for i, s in enumerate(ranked) if s.control],
    )


def _training(section: Section, story: Story) -> None:
    section.paragraph(
        f"Each encoder is the same small ViT, trained for {story.epochs} epochs on the same images with the same "
        "crops, masks (three quarters of the patches hidden) and learning rate; only what it predicts for the hidden "
        "patches differs. The losses have different units and cannot be compared with each other."
    )
    section.chart(
        loss_curves(story.curves),
        description="Training loss of each encoder over epochs.",
        caption="Training loss, averaged over every few steps.",
    )


def _predictions(section: Section, story: Story) -> None:
    order = predicted_order(story.judged)
    section.paragraph(
        "Before any training, this ranking was written to `predictions.json`: by the cross-fitted alignment of what "
        "each encoder is to predict. Predicting pixels counts as one token for every patch (`identity`), which recurs "
        "in no other image."
    )
    by_name = {j.name: j for j in story.judged}
    section.table(
        [
            Column(key="name", title="encoder", kind="text"),
            Column(key="foreseen", title="foreseen place", digits=0),
            Column(key="alignment", title="alignment"),
            Column(key="knn", title="k-NN, %", digits=1, best="max"),
            Column(key="linear", title="linear, %", digits=1, best="max"),
        ],
        [_judged_row(by_name[name], order) for name in order],
        caption="The trained encoders in the foreseen order; equal alignments share no order.",
    )
    for sentence in prediction_findings(story.judged, story.test_images):
        section.paragraph(sentence)
    section.paragraph(
        "A few encoders, one seed and an easy data set cannot prove or refute a score: that takes more vocabularies, "
        "several seeds and harder images."
    )
