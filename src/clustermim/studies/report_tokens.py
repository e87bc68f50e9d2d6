"""The part of a study's page that shows tokens: their scores, vocabularies and maps."""

from clustermim.data.sources import ImageSource
from clustermim.errors import ClusterMIMError
from clustermim.render.page import Column, Section
from clustermim.studies.charts import score_chart
from clustermim.studies.collecting import Findings
from clustermim.studies.folder import StudyFolder
from clustermim.studies.opening import Sources
from clustermim.studies.recipe import Recipe
from clustermim.studies.scores import SCORES, leading
from clustermim.studies.telling import opening
from clustermim.tokenizers.tokenizer import load_tokenizer
from clustermim.verbs.token_views import look_at_tokens
from clustermim.verbs.tokenizer_show import add_maps, add_vocabulary

_PICTURED = 2000  # images that the pictures of tokens are looked for in
_MOST_TOKENS = 200  # pictures of a vocabulary
_GROWS = ("tcas_rows", "tcas_rows_crossfit")  # with K, whatever the tokens are


def add_tokens(section: Section, findings: Findings, folder: StudyFolder, sources: Sources, recipe: Recipe) -> None:
    """A table of every tokenizer and its scores, and pictures of those that the recipe wants shown."""
    section.paragraph(
        "Images are cut into patches. A tokenizer groups the patches of the training images, and a patch's group is "
        "its **token**: what a model learns to predict where the patch is hidden. **Alignment** is 0 if tokens say "
        "nothing about the class and 1 if every token belongs to one class. Cross-fitted figures are counted on some "
        "images and checked on others, so that a large vocabulary is not flattered. No score needs any training."
    )
    score = leading([t.scores for t in findings.tokens])
    for data in dict.fromkeys(t.data for t in findings.tokens):
        chart = score_chart(findings, data, score)
        if chart is not None:
            section.chart(
                chart,
                description=f"{score.title} of each tokenizer on {data}; the numbers are in the table.",
                caption=f"{opening(score.title)} on {data}, with 95 % intervals where there are any. Grey: "
                "controls, which bracket every result.",
            )
    rows = [{**vars(t), **t.scores, "reason": t.reason or None} for t in findings.tokens]
    several = len({t.data for t in findings.tokens}) > 1
    present = [s for s in SCORES if any(s.key in row for row in rows)]
    section.table(
        [
            Column(key="name", title="tokenizer", kind="text"),
            *([Column(key="data", title="data", kind="text")] if several else []),
            Column(key="k", title="K", digits=0),
            Column(key="used_tokens", title="used", digits=0),
            *(
                Column(
                    key=s.key,
                    title=s.title,
                    best=None if s.key in _GROWS else "max" if s.higher else "min",
                    low=f"{s.key}_low" if s.key == SCORES[0].key else None,
                    high=f"{s.key}_high" if s.key == SCORES[0].key else None,
                )
                for s in present
            ),
            Column(key="seconds", title="seconds", digits=1),
            Column(key="reason", title="missing because", kind="text", optional=True),
        ],
        rows,
        caption="Scores of every tokenizer, known before training. Best in bold; controls, in grey, do not compete. "
        "TCAS rows grows with K and can be compared at equal K only.",
        muted=[i for i, t in enumerate(findings.tokens) if t.control],
        filterable=True,
    )
    for name in recipe.shown:
        for token in [t for t in findings.tokens if t.name == name and folder.piece(t.fit).exists()][:1]:
            part = sources.part(token.data, _PICTURED)
            _pictures(section, name, token.data, part, folder, token.fit)


def _pictures(section: Section, name: str, data: str, part: ImageSource, folder: StudyFolder, fit: str) -> None:
    try:
        view = look_at_tokens(load_tokenizer(folder.piece(fit) / "tokenizer"), part, examples=8, most=_MOST_TOKENS)
    except ClusterMIMError as problem:  # a picture is no reason to lose a page
        section.paragraph(f"No pictures of `{name}`: {problem}")
        return
    section.paragraph(
        f"**`{name}` on {data}**: {view.used:,} of {view.vocab_size:,} tokens occur in {view.images:,} images. They "
        f"are used as unevenly as if there were {view.perplexity:,.0f} in even use (perplexity)."
    )
    add_maps(section, view)
    add_vocabulary(section, view, folded=f"The vocabulary of {name}")
