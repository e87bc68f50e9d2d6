"""What the scores mean, in sentences: which tokens to take, and what these images cannot show."""

from collections.abc import Collection, Mapping

from clustermim.scoring.comparing import compare
from clustermim.scoring.tcas import TokenScore

SURE = 0.95


def with_interval(score: TokenScore, figure: str) -> str:
    """A figure with its interval, for people: `0.049 [0.045, 0.053]`; `-` where it is not known."""
    value = getattr(score, figure)
    if value is None:
        return "-"
    interval = score.intervals.get(figure)
    return f"{value:.3f}" if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def best_of(scores: Mapping[str, TokenScore], controls: Collection[str] = ()) -> str | None:
    """The tokenizer of the highest cross-fitted alignment, controls aside unless there is nothing else.

    None where only plug-in figures are known.
    """
    candidates = [name for name in scores if name not in controls] or list(scores)
    known = {name: score.alignment_crossfit for name in candidates for score in [scores[name]]}
    if not known or any(value is None for value in known.values()):
        return None
    return max(known, key=lambda name: known[name] or 0.0)


def advise(scores: Mapping[str, TokenScore], controls: Collection[str] = ()) -> list[str]:
    """Sentences of advice on scores of the same images.

    Parameters
    ----------
    scores
        Name -> score.
    controls
        Names that are there for comparison only and never recommended.
    """
    candidates = {name: score for name, score in scores.items() if name not in controls}
    if not candidates:
        return ["Only controls were scored: they bracket the scale (random 0, oracle 1). Add a fitted tokenizer."]
    images = next(iter(candidates.values())).images
    if any(score.alignment_crossfit is None for score in candidates.values()):
        return [
            "Only plug-in figures are known, and they rise with every token that is added, useful or not: compare them "
            "only between vocabularies of one size, or label more images of each class."
        ]
    crossfit = {name: score.alignment_crossfit or 0.0 for name, score in candidates.items()}
    best = max(crossfit, key=lambda name: crossfit[name])
    lead = (
        f"{best} (K={candidates[best].vocab_size:,}): alignment {with_interval(candidates[best], 'alignment_crossfit')}"
    )
    low = candidates[best].alignment_crossfit_low
    sentences = []
    if crossfit[best] <= 0 or (low is not None and low <= 0):
        sentences.append(
            f"{lead}, which {images:,} labelled images cannot tell from tokens drawn at random: label more images, or "
            "describe patches by other features."
        )
    elif len(candidates) == 1:
        sentences.append(f"{lead}; 0 is what random tokens reach, 1 what tokens that name the class reach.")
    else:
        sentences.append(f"{lead}, the best of {len(candidates)}{_rivals(best, candidates)}.")
    flattered = [n for n, s in candidates.items() if s.alignment - crossfit[n] > max(0.02, crossfit[n])]
    if flattered:
        worst = max(flattered, key=lambda name: candidates[name].alignment - crossfit[name])
        plug_in, kept = candidates[worst].alignment, max(0.0, crossfit[worst])
        sentences.append(
            f"Of the plug-in alignment {plug_in:.3f} of {worst}, only {kept:.3f} holds on images it was not counted "
            f"on: its {candidates[worst].vocab_size:,} tokens are more than {images:,} labelled images can judge."
        )
    return sentences


def _rivals(best: str, candidates: Mapping[str, TokenScore]) -> str:
    """How sure the lead is, and the smallest vocabulary that cannot be told from the best."""
    leader = candidates[best]
    if not leader.bootstrap:
        return "; a bootstrap would tell how sure that is"
    chances = {name: compare(leader, score).probability for name, score in candidates.items() if name != best}
    close = {name: chance for name, chance in chances.items() if chance < SURE}
    if not close:
        surest = min(0.99, min(chances.values()))
        return f", better than any other with a probability of {surest:.2f} or more"
    smallest = min(close, key=lambda name: candidates[name].vocab_size)
    if candidates[smallest].vocab_size < leader.vocab_size:
        return (
            f", but {smallest} (K={candidates[smallest].vocab_size:,}) cannot be told from it "
            f"(probability {close[smallest]:.2f} that {best} is better): more tokens gain nothing that "
            f"{leader.images:,} images can show"
        )
    named = ", ".join(close)
    return f", though {leader.images:,} images cannot tell it from {named}"
