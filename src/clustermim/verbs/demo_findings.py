"""What the demo found, in plain words computed from its numbers: nothing here knows how it comes out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

PROTOCOLS = {"knn": "k-NN", "linear": "linear probe"}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One encoder and its test accuracies in [0, 1] by protocol."""

    name: str
    floor: bool
    accuracy: Mapping[str, float]
    """`knn` and `linear`."""
    masked: str | None = None
    """What was predicted in training: `token` or `pixel`; None for a floor."""
    alignment: float | None = None
    """Cross-fitted alignment of the tokens that were predicted; for pixels that of one token a patch."""
    tokens: str | None = None
    """Which tokens these are."""


def noise(accuracy: float, images: int) -> float:
    """Half width of the 95 % interval of a difference between two such accuracies on `images` test images.

    Normal approximation for two independent proportions. Both encoders see the same images, so the true width is
    mostly smaller: a difference within it should not be believed.
    """
    return 1.96 * sqrt(2 * accuracy * (1 - accuracy) / images)


def answer(judged: Sequence[Judged], test_images: int) -> list[str]:
    """Tokens against pixels, for the top of the page.

    Compared are the token arm that the score chose before training, and whichever pixel arm did better on the test:
    the choice, if it favours any, favours pixels.
    """
    chosen = predicted_order([j for j in judged if j.masked == "token"])
    tokens = next((j for j in judged if chosen and j.name == chosen[0]), None)
    pixels = _best([j for j in judged if j.masked == "pixel"], "linear")
    if tokens is None or pixels is None:
        return []
    of_its_kind = ", the better of its kind" if sum(j.masked == "pixel" for j in judged) > 1 else ""
    told = [
        f"Masked **tokens** ({tokens.name}, the vocabulary chosen by its score before training) against masked "
        f"**pixels** ({pixels.name}{of_its_kind}), frozen features, the same number of epochs:"
    ]
    for protocol, words in PROTOCOLS.items():
        ours, theirs = tokens.accuracy[protocol], pixels.accuracy[protocol]
        gap, believed = ours - theirs, noise((ours + theirs) / 2, test_images)
        verdict = f"**{abs(100 * gap):.1f} points {'more' if gap > 0 else 'less'}**" if gap else "**the same**"
        doubt = (
            f", within the noise of {test_images} test images (±{100 * believed:.1f})" if abs(gap) <= believed else ""
        )
        told.append(f"By {words}, {percent(ours)} against {percent(theirs)}: {verdict}{doubt}.")
    return told


def floor_findings(judged: Sequence[Judged], test_images: int) -> list[str]:
    """For each protocol: does a floor, which no pretraining has touched, keep up with what was trained?"""
    told, easy = [], False
    for protocol, words in PROTOCOLS.items():
        trained = _best([j for j in judged if not j.floor], protocol)
        floor = _best([j for j in judged if j.floor], protocol)
        if trained is None or floor is None:
            continue
        high, low = floor.accuracy[protocol], trained.accuracy[protocol]
        clear = abs(high - low) > noise((low + high) / 2, test_images)
        easy = easy or high > low or not clear
        if high > low:
            told.append(
                f"**By {words} a floor wins:** `{floor.name}`, which no pretraining has touched, reaches "
                f"{percent(high)}; the best trained encoder, {trained.name}, {percent(low)}"
                + ("." if clear else f", which {test_images} test images cannot tell apart.")
            )
        elif not clear:
            told.append(
                f"**By {words} no encoder clearly beats the floors:** {trained.name} reaches {percent(low)}, the floor "
                f"`{floor.name}` {percent(high)}, and {test_images} test images cannot tell the two apart."
            )
        else:
            told.append(
                f"By {words} the best trained encoder, {trained.name}, is above every floor: {percent(low)} against "
                f"{percent(high)} of `{floor.name}`."
            )
    if easy:
        told.append(
            "Digits are easy: small, centred, and so alike within a class that their pixels already tell the classes "
            "apart. Judge encoders on your own images before you conclude anything from these."
        )
    return told


def predicted_order(judged: Sequence[Judged]) -> list[str]:
    """Names of the trained encoders, best first by the alignment of what they predict; known before any training."""
    known = [j for j in judged if j.alignment is not None and not j.floor]
    return [j.name for j in sorted(known, key=lambda j: -(j.alignment or 0.0))]


def prediction_findings(judged: Sequence[Judged], test_images: int) -> list[str]:
    """How well the ranking by alignment foresaw the ranking by accuracy, pair by pair."""
    told = []
    for protocol, words in PROTOCOLS.items():
        right = wrong = open_ = 0
        for higher, lower in _ranked_pairs(judged):
            gap = higher.accuracy[protocol] - lower.accuracy[protocol]
            if abs(gap) <= noise((higher.accuracy[protocol] + lower.accuracy[protocol]) / 2, test_images):
                open_ += 1
            elif gap > 0:
                right += 1
            else:
                wrong += 1
        total = right + wrong + open_
        if total:
            told.append(
                f"By {words}, of {total} pairs of encoders whose targets differ in alignment, {right} came out in the "
                f"foreseen order, {wrong} in the opposite one, and {open_} too close to call on {test_images} test "
                "images."
            )
    return told


def _ranked_pairs(judged: Sequence[Judged]) -> Iterator[tuple[Judged, Judged]]:
    known = [j for j in judged if j.alignment is not None and not j.floor]
    for one, other in combinations(known, 2):
        if one.alignment != other.alignment:
            yield (one, other) if (one.alignment or 0.0) > (other.alignment or 0.0) else (other, one)


def _best(judged: Sequence[Judged], protocol: str) -> Judged | None:
    known = [j for j in judged if protocol in j.accuracy]
    return max(known, key=lambda j: j.accuracy[protocol]) if known else None


def percent(share: float) -> str:
    """A share in percent with one decimal and a space that does not break."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
