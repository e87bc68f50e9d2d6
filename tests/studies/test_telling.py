"""The sentences of a page say what the figures say, whichever way these come out."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_samples import findings, run

from clustermim.studies.answers import Pair, Sweep, SweepPoint, answer
from clustermim.studies.correlating import foreseen_pairs, noise, paired_difference
from clustermim.studies.telling import (
    floor_sentences,
    headline,
    moment,
    pair_sentence,
    prediction_sentences,
    sweep_sentences,
)


def test_a_winning_floor_is_told_in_plain_words() -> None:
    warned, fine = floor_sentences(findings([run("ours", 0.9)], {"raw-pixels": 0.98, "random": 0.5}))
    assert not fine
    assert "No encoder beats the floors" in warned[0] and "reaches 98.0\N{NO-BREAK SPACE}%" in warned[0]
    assert "cannot tell" not in warned[0]
    assert "images are easy" in warned[-1]


@pytest.mark.parametrize("floor", [0.955, 0.945])
def test_what_test_images_cannot_tell_apart_is_no_lead(floor: float) -> None:
    warned, fine = floor_sentences(findings([run("ours", 0.95)], {"raw-pixels": floor}))
    assert not fine and "360 test images cannot tell the two apart" in warned[0]


def test_where_no_floor_keeps_up_nothing_is_warned_of() -> None:
    warned, fine = floor_sentences(findings([run("ours", 0.95)], {"raw-pixels": 0.5}))
    assert warned == [] and "above every floor" in fine[0]


def test_one_seed_is_told_with_the_noise_of_the_test_images() -> None:
    gap = paired_difference({0: 0.95}, {0: 0.94})
    assert gap is not None
    facts: dict[str, Any] = {"data": "d", "judged_on": "d", "protocol": "linear", "chosen_among": ["b"]}
    pair = Pair(ours="a", theirs="b", our_accuracy=0.95, their_accuracy=0.94, difference=gap, test_images=360, **facts)
    assert "**1.0 points above** b" in pair_sentence(pair)
    assert f"±{100 * noise(0.945, 360):.1f} points" in pair_sentence(pair)


@pytest.mark.parametrize(("ours", "theirs", "may_be_chance"), [(0.95, 0.94, True), (0.95, 0.7, False)])
def test_one_seed_is_called_chance_only_where_test_images_cannot_tell(
    ours: float, theirs: float, may_be_chance: bool
) -> None:
    gap = paired_difference({0: ours}, {0: theirs})
    assert gap is not None
    facts: dict[str, Any] = {"data": "d", "judged_on": "d", "protocol": "linear", "chosen_among": ["b"]}
    pair = Pair(
        ours="a", theirs="b", our_accuracy=ours, their_accuracy=theirs, difference=gap, test_images=360, **facts
    )
    told = pair_sentence(pair)
    assert ("it may be chance" in told) == may_be_chance and ("more than chance" in told) != may_be_chance


def test_the_page_opens_with_the_best_target_who_is_level_with_it_and_the_floor() -> None:
    found = findings([run("a", 0.9), run("b", 0.89), run("c", 0.5)], {"raw-pixels": 0.95})
    told = headline(found, answer(found))[0]
    assert "**a comes first of 3 targets**" in told and "cannot tell it from b." in told
    assert "`raw-pixels`, which no pretraining has touched, reaches 95.0" in told
    clear = findings([run("a", 0.9), run("b", 0.6), run("c", 0.5)], {"raw-pixels": 0.3})
    told = headline(clear, answer(clear))[0]
    assert "cannot tell" not in told and "raw-pixels" not in told


def test_several_seeds_are_told_by_their_mean_and_their_ends() -> None:
    seeds = [replace(run("a", value), seed=seed) for seed, value in enumerate((0.8, 0.9))]
    told = headline(found := findings([*seeds, run("b", 0.5)], {}), answer(found))[0]
    space = "\N{NO-BREAK SPACE}"
    assert f"with 85.0{space}% (mean of 2 seeds, 80.0{space}% to 90.0{space}%)" in told


def test_a_ranking_of_few_targets_is_no_verdict_and_its_regret_is_told() -> None:
    runs = [run("a", 0.9, "a"), run("b", 0.5, "b"), run("c", 0.4, "c")]
    few = findings(runs, {}, {"a": 1, "b": 3, "c": 2})
    told = headline(few, answer(few))[1]
    assert "cannot be told" in told and "cross-fitted alignment" in told
    assert "costs **40.0 points**. A random pick costs 30.0" in told
    many = findings([run(n, v, n) for n, v in zip("abcdef", (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), strict=True)], {},
                    dict(zip("abcdef", (6, 5, 4, 3, 2, 1), strict=True)))  # fmt: skip
    told = headline(many, answer(many))[1]
    assert "**ranks** the 6 token targets" in told and "95 % interval" in told
    assert told.endswith("the target that it picks without training is the best of them.")


@pytest.mark.parametrize(
    ("axis", "says"),
    [("K", "pixel tokens do best at K = 1,000 (80.0"), ("mask ratio", "pixel does best with 60% hidden (80.0")],
)
def test_a_sweep_is_told_by_its_ends(axis: str, says: str) -> None:
    points = [
        SweepPoint(x=x, y=y, low=y, high=y, seeds=1, name=str(x))
        for x, y in (((10.0, 0.5), (1000.0, 0.8)) if axis == "K" else ((0.4, 0.5), (0.6, 0.8)))
    ]
    sweep = Sweep(data="d", judged_on="d", protocol="linear", axis=axis, lines={"pixel": points, "flat": points[:1]})
    (told,) = sweep_sentences(findings([run("a", 0.5)], {}), sweep)
    assert says in told and "cannot tell" not in told


def test_a_moment_is_told_as_people_write_it() -> None:
    assert moment("2026-03-07T09:05:59+00:00") == "7 March 2026 at 09:05 UTC"


def test_equal_scores_foretell_no_order() -> None:
    found = findings([run("a", 0.1, "s"), run("b", 0.9, "t")], {}, {"s": 0.3, "t": 0.3})
    assert prediction_sentences(found, answer(found)) == []


def test_pairs_are_told_in_the_order_of_the_score() -> None:
    found = findings([run(n, v, n) for n, v in (("a", 0.9), ("b", 0.5), ("c", 0.49))], {}, {"a": 3, "b": 2, "c": 1})
    assert "of 3 pairs" in (told := prediction_sentences(found, answer(found))[-1])
    assert "2 came out in the foreseen order, 0 in the opposite one, and 1 too close to call" in told


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.2]), st.floats(0, 1)), min_size=1, max_size=6), st.booleans())
@settings(deadline=None, max_examples=40)
def test_every_pair_is_counted_once_and_turns_round_with_the_score(
    cells: list[tuple[float, float]], higher: bool
) -> None:
    scores = {str(i): score for i, (score, _) in enumerate(cells)}
    accuracies = {str(i): accuracy for i, (_, accuracy) in enumerate(cells)}
    right, wrong, close = foreseen_pairs(scores, accuracies, 360, higher=higher)
    assert right + wrong + close == sum(scores[a] != scores[b] for a in scores for b in scores if a < b)
    assert foreseen_pairs(scores, accuracies, 360, higher=not higher) == (wrong, right, close)
