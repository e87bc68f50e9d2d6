"""The scores that a study compares: their names, which way is better, and where each comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """A figure of tokens that is known before any training."""

    key: str
    title: str
    higher: bool
    """Whether more of it promises better encoders."""
    labels: bool = True
    """Whether it takes labels."""

    @property
    def named(self) -> str:
        """As a sentence names it: `cross-fitted alignment`, where a table has `alignment, cross-fitted`."""
        what, comma, how = self.title.partition(", ")
        return f"{how} {what}" if comma and how in ("cross-fitted", "plug-in") else self.title


SCORES: tuple[Score, ...] = (
    Score("alignment_crossfit", "alignment, cross-fitted", True),
    Score("alignment", "alignment, plug-in", True),
    Score("tcas_crossfit", "TCAS walk, cross-fitted", False),
    Score("tcas", "TCAS walk, plug-in", False),
    Score("tcas_rows_crossfit", "TCAS rows, cross-fitted", False),
    Score("tcas_rows", "TCAS rows, plug-in", False),
    Score("tcas_cosine_crossfit", "TCAS cosine, cross-fitted", False),
    Score("tcas_cosine", "TCAS cosine, plug-in", False),
    Score("labelling_error_crossfit", "labelling error α, cross-fitted", False),
    Score("labelling_error", "labelling error α, plug-in", False),
    Score("graph_sum_squared", "Σλ² of the graph", False, labels=False),
    Score("graph_labelling_error", "α of the graph", False),
    Score("graph_bound", "c1·Σλ² + c2·α, c2 = 2·c1", False),
    Score("nmi", "NMI", True),
    Score("perplexity", "perplexity", True, labels=False),
    Score("view_agreement", "agreement between views, no labels", True, labels=False),
    Score("patch_agreement", "agreement between patches, no labels", True, labels=False),
)
"""The first is the one that the study leads with."""

BY_KEY: Mapping[str, Score] = {score.key: score for score in SCORES}


def leading(rows: Sequence[Mapping[str, Any]]) -> Score:
    """The score to choose by: cross-fitted alignment, or, where nothing is labelled, agreement between views."""
    labelled = any(row.get(SCORES[0].key) is not None for row in rows)
    return SCORES[0] if labelled else BY_KEY["view_agreement"]


def ranking(values: Mapping[str, float], score: Score) -> list[list[str]]:
    """Names from best to worst; names of equal value share a place.

    Parameters
    ----------
    values
        Name -> value of the score.
    score
        Which says what is better.
    """
    levels = sorted(set(values.values()), reverse=score.higher)
    return [sorted(name for name, value in values.items() if value == level) for level in levels]
