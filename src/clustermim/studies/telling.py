"""The answers of a study in words, computed from its figures: nothing here knows how they come out."""

from collections.abc import Mapping, Sequence
from datetime import datetime

import numpy as np

from clustermim.studies.answers import CHOICES, Answers, Pair, Ranked, Sweep, main_setting
from clustermim.studies.carrying import Carried
from clustermim.studies.collecting import Findings, RunRow, by_cell, test_images_of
from clustermim.studies.correlating import FEWEST_RESAMPLED, Correlation, foreseen_pairs, noise
from clustermim.studies.scores import leading

WAYS = {"knn": "k-NN", "linear": "linear probe", "finetune": "fine-tuning", "fewshot": "few-shot"}
"""How a sentence names a protocol."""

_FEW = 2  # judgements whose scores and pairs the top of the page has room for


def where(data: str, judged_on: str) -> str:
    """How a sentence names a data set and, if it is another, the one that was pretrained on."""
    return data if data == judged_on else f"{judged_on} after pretraining on {data}"


def headline(findings: Findings, answers: Answers) -> list[str]:
    """The answer in a few sentences, for the top of the page; computed, whichever way it comes out.

    Of more than two judgements it says which target is best and what carries over; scores and pairs have sections.
    """
    told = []
    for data, judged_on in findings.judgements:
        told += _best_sentence(findings, data, judged_on)
        told += [
            carried_sentence(one)
            for one in answers.carried
            if (one.data, one.judged_on, one.protocol) == (data, judged_on, "linear")
        ]
        if len(findings.judgements) > _FEW:
            continue
        told += [
            _score_sentence(one, findings)
            for one in answers.ranked
            if (one.data, one.judged_on, one.scope, one.protocol) == (data, judged_on, CHOICES, "linear")
            and one.score == leading([t.scores for t in findings.tokens])
        ]
        told += [
            pair_sentence(pair)
            for pair in answers.pairs
            if (pair.data, pair.judged_on, pair.protocol) == (data, judged_on, "linear")
        ]
    if not told and not any(row.accuracy for row in findings.runs):
        why = findings.failures[0]["reason"] if findings.failures else "the images have no labels."
        told.append(f"Nothing could be judged: {why}")
    if not told:
        told.append("Too few targets came to an end to say which is best, or whether a score ranks them.")
    return told


def plain(text: str) -> str:
    """A sentence without its marks, for a terminal or a file."""
    return text.replace("**", "").replace("`", "")


def _best_sentence(findings: Findings, data: str, judged_on: str) -> list[str]:
    """Which target is best by linear probe, how surely, and whether a floor does as well; none for fewer than two."""
    here = findings.runs_on(data, judged_on)
    means = {name: float(np.mean(values)) for name, values in by_cell(here, "linear").items()}
    if len(means) < 2:
        return []
    best = max(means, key=lambda name: means[name])
    rows = [row for row in here if row.name == best and "linear" in row.accuracy]
    if len(rows) > 1:
        ends = sorted(row.accuracy["linear"] for row in rows)
        sure = f" (mean of {len(rows)} seeds, {_percent(ends[0])} to {_percent(ends[-1])})"
    elif "linear" in rows[0].intervals:
        low, high = rows[0].intervals["linear"]
        sure = f" (one seed, 95 % interval over test images {_percent(low)} to {_percent(high)})"
    else:
        sure = " (one seed)"
    told = (
        f"On {where(data, judged_on)}, **{best} comes first of {len(means)} targets** by linear probe, with "
        f"{_percent(means[best])}{sure}."
    )
    images = test_images_of(here)
    close = [] if images is None else [n for n, v in means.items() if n != best and _close(means[best], v, images)]
    if close:
        others = close[0] if len(close) == 1 else f"{len(close)} of the others"
        others = "any of the others" if len(close) == len(means) - 1 > 1 else others
        told += f" {images:,} test images cannot tell it from {others}."
    floors = _floors_of(findings, data, judged_on, "linear")
    top = max(floors, key=lambda name: floors[name], default=None)
    if top is not None and floors[top] >= means[best]:
        told += f" The floor `{top}`, which no pretraining has touched, reaches {_percent(floors[top])}."
    return [told]


def _score_sentence(one: Ranked, findings: Findings) -> str:
    """How the leading score ranked what a person would choose among, and what picking by it costs."""
    c, r = one.correlation, one.regret
    place, name = where(one.data, one.judged_on), one.score.named
    if c.spearman_low is None:
        told = (
            f"On {place}, whether {name} ranks the {c.cells} token targets **cannot be told**: their Spearman "
            f"correlation with linear accuracy is {_signed(c.spearman)}, and an interval takes {FEWEST_RESAMPLED}"
        )
    else:
        verdict = _verdict(c, "ranks", "ranks in the wrong order", "does not clearly rank")
        told = (
            f"On {place}, {name} **{verdict}** the {c.cells} token targets by linear probe (Spearman "
            f"{_signed(c.spearman)}, 95 % interval {_signed(c.spearman_low)} to {_signed(c.spearman_high)})"
        )
    if r is None:
        return f"{told}."
    here = findings.runs_on(one.data, one.judged_on)
    images, best = test_images_of(here), float(np.mean(by_cell(here, "linear")[r.best]))
    if r.points == 0:
        return f"{told}; the target that it picks without training is the best of them."
    doubt = ""
    if images is not None and r.points <= 100 * noise(best, images):
        doubt = f", less than {images:,} test images can tell"
    return (
        f"{told}; picking by it alone, without training, costs **{r.points:.1f} points**{doubt}. A random pick costs "
        f"{r.random_points:.1f} on average."
    )


def _close(one: float, other: float, images: int) -> bool:
    return abs(one - other) <= noise((one + other) / 2, images)


def _floors_of(findings: Findings, data: str, judged_on: str, protocol: str) -> dict[str, float]:
    return {
        floor.name: floor.accuracy[protocol]
        for floor in findings.floors
        if (floor.data, floor.judged_on) == (data, judged_on) and protocol in floor.accuracy
    }


def _verdict(c: Correlation, right: str, wrong: str, unclear: str) -> str:
    """Which of three ways to say it an interval allows."""
    if c.spearman_low is not None and c.spearman_low > 0:
        return right
    if c.spearman_high is not None and c.spearman_high < 0:
        return wrong
    return unclear


def pair_sentence(pair: Pair) -> str:
    """One comparison in words."""
    gap = pair.difference
    points = f"{abs(gap.points):.1f} points {'above' if gap.points > 0 else 'below'}"
    among = (
        f" (the better of {' and '.join(pair.chosen_among)} on validation images)" if len(pair.chosen_among) > 1 else ""
    )
    if gap.low is not None:
        clear = "clear of chance" if gap.low > 0 or (gap.high or 0) < 0 else "within chance"
        doubt = f" ({gap.pairs} paired seeds, 95 % interval {_signed(gap.low, 1)} to {_signed(gap.high, 1)}: {clear})"
    else:
        doubt = ", from one seed"
        if pair.test_images:
            chance = 100 * noise((pair.our_accuracy + pair.their_accuracy) / 2, pair.test_images)
            alone = f"{pair.test_images:,} test images alone leave ±{chance:.1f} points"
            if abs(gap.points) <= chance:
                doubt += f": **it may be chance**, for {alone}"
            else:
                doubt += f": that is more than chance among test images, for {alone}, but seeds may differ too"
    way = WAYS.get(pair.protocol, pair.protocol)
    return f"On {where(pair.data, pair.judged_on)}, {pair.ours} is **{points}** {pair.theirs}{among} by {way}{doubt}."


def carried_sentence(one: Carried) -> str:
    """Whether an order carries over to other data, and what it costs to pretrain elsewhere."""
    way, told = WAYS.get(one.protocol, one.protocol), []
    if one.order is not None:
        c = one.order
        n = f"{c.cells} targets of {one.data}"
        if c.spearman_low is None:
            told.append(
                f"Whether the order of the {n} carries over to {one.judged_on} **cannot be told** by {way}: Spearman's "
                f"correlation is {_signed(c.spearman)}, and an interval takes {FEWEST_RESAMPLED}."
            )
        else:
            verdict = _verdict(c, "carries over** to", "is turned round** on", "does not clearly carry over** to")
            told.append(
                f"The order of the {n} **{verdict} {one.judged_on} by {way} (Spearman {_signed(c.spearman)}, 95 % "
                f"interval {_signed(c.spearman_low)} to {_signed(c.spearman_high)})."
            )
    if one.cost is not None:
        mean, least, most = one.cost
        spread = f" (mean of {len(one.costs)} targets, {_signed(-most, 1)} to {_signed(-least, 1)})"
        side = "below" if mean >= 0 else "above"
        told.append(
            f"Pretrained on {one.data}, {'they' if told else 'encoders'} lie **{abs(mean):.1f} points {side}** those "
            f"pretrained on {one.judged_on} itself{spread if len(one.costs) > 1 else ''}."
        )
    return " ".join(told)


def floor_sentences(findings: Findings) -> tuple[list[str], list[str]]:
    """How the best encoder stands to the best floor, for each way to judge frozen features.

    Returns
    -------
    list[str]
        Where a floor keeps up, and what that means: what no reader may overlook.
    list[str]
        Where encoders are clearly above every floor.
    """
    warned, fine = [], []
    for data, judged_on in findings.judgements:
        here = findings.runs_on(data, judged_on)
        images = test_images_of(here)
        for protocol in findings.protocols:
            means = {name: float(np.mean(values)) for name, values in by_cell(here, protocol).items()}
            floors = _floors_of(findings, data, judged_on, protocol)
            if not means or not floors:
                continue
            best, floor = max(means, key=lambda n: means[n]), max(floors, key=lambda n: floors[n])
            gap = means[best] - floors[floor]
            clear = images is None or not _close(means[best], floors[floor], images)
            by = f"by {WAYS.get(protocol, protocol)} on {where(data, judged_on)}"
            ours, theirs = f"{best} reaches {_percent(means[best])}", f"the floor `{floor}` {_percent(floors[floor])}"
            apart = "" if clear else f" {images:,} test images cannot tell the two apart."
            if clear and gap > 0:
                fine.append(f"{opening(by)} the best encoder is above every floor: {ours}, {theirs}.")
            elif gap > 0:
                warned.append(f"**No encoder clearly beats the floors** {by}: {ours}, {theirs}.{apart}")
            else:
                warned.append(
                    f"**No encoder beats the floors** {by}: `{floor}`, which no pretraining has touched, reaches "
                    f"{_percent(floors[floor])}, {best} {_percent(means[best])}.{apart}"
                )
    if warned:
        warned.append(
            "Where a floor keeps up, the images are easy or the trainings too short, and accuracies say little about "
            "the targets. Judge them on your own images before you conclude anything from these."
        )
    return warned, fine


def prediction_sentences(findings: Findings, answers: Answers) -> list[str]:
    """What the leading score foretold to be best, and what was; and pair by pair, which order it foretold."""
    score = leading([t.scores for t in findings.tokens])
    told = []
    for one in answers.ranked:
        if (one.score, one.protocol, one.scope) != (score, "linear", CHOICES) or one.regret is None:
            continue
        r = one.regret
        here = findings.runs_on(one.data, one.judged_on)
        best = float(np.mean(by_cell(here, "linear")[r.best]))
        images = test_images_of(here)
        if r.points == 0:
            right = "which it is"
        elif images is not None and r.points <= 100 * noise(best, images):
            right = f"but {r.best} is, by {r.points:.1f} points, too little to be sure of on {images:,} test images"
        else:
            right = f"but {r.best} is, by {r.points:.1f} points: the prediction **failed**"
        place = where(one.data, one.judged_on)
        told.append(f"{opening(score.named)} foretold that {r.picked} would be best on {place}, {right}.")
    for data, judged_on in findings.judgements:
        runs = [row for row in findings.runs_on(data, judged_on) if row.accuracy]
        told += [s for protocol in findings.protocols if (s := _pairs_sentence(findings, runs, protocol))]
    return told


def _pairs_sentence(findings: Findings, judged: Sequence[RunRow], protocol: str) -> str:
    """How many pairs of targets came out in the foreseen order, and how many are too close to call."""
    score = leading([t.scores for t in findings.tokens])
    runs = [row for row in main_setting(judged) if protocol in row.accuracy]
    values = {row.name: found for row in runs if (found := findings.scores_of(row).get(score.key)) is not None}
    images = test_images_of(runs)
    means: Mapping[str, float] = {name: float(np.mean(found)) for name, found in by_cell(runs, protocol).items()}
    right, wrong, close = foreseen_pairs(values, means, images, higher=score.higher)
    total = right + wrong + close
    if not total:
        return ""
    by = f"By {WAYS.get(protocol, protocol)} on {where(runs[0].data, runs[0].judged_on)}"
    uncalled = "" if images is None else f", and {close} too close to call on {images:,} test images"
    if total == 1:
        came = "in the foreseen order" if right else "in the opposite order" if wrong else "too close to call"
        return f"{by}, the one pair of targets that differ in {score.named} came out {came}."
    return (
        f"{by}, of {total} pairs of targets that differ in {score.named}, {right} came out in the foreseen order, "
        f"{wrong} in the opposite one{uncalled}."
    )


def sweep_sentences(findings: Findings, sweep: Sweep) -> list[str]:
    """Where each line of a sweep is highest, and what is lost elsewhere."""
    told = []
    images = test_images_of(findings.runs_on(sweep.data, sweep.judged_on))
    by = f"By {WAYS.get(sweep.protocol, sweep.protocol)} on {where(sweep.data, sweep.judged_on)}"
    for name, points in sweep.lines.items():
        best, worst = max(points, key=lambda p: p.y), min(points, key=lambda p: p.y)
        if best.y == worst.y:
            continue
        tokens = sweep.axis == "K"
        subject = f"{name} tokens do" if tokens else f"{name} does"
        at = {p: f"at K = {p.x:,.0f}" if tokens else f"with {p.x:.0%} hidden" for p in (best, worst)}
        doubt = ""
        if images is not None and _close(best.y, worst.y, images):
            doubt = f"; {images:,} test images cannot tell these apart"
        told.append(
            f"{by}, {subject} best {at[best]} ({_percent(best.y)}) and worst {at[worst]} ({_percent(worst.y)}){doubt}."
        )
    return told


def _signed(value: float | None, digits: int = 2) -> str:
    return "?" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def moment(text: str) -> str:
    """A time as people write it, from ISO 8601."""
    time = datetime.fromisoformat(text)
    return f"{time.day} {time:%B %Y at %H:%M} {time.tzname() or ''}".rstrip()


def opening(text: str) -> str:
    """As a sentence begins: a name of data, target or score begins small."""
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    """With one decimal and a space that does not break."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
