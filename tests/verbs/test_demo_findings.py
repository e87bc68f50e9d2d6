import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.verbs.demo_findings import (
    Judged,
    answer,
    floor_findings,
    noise,
    predicted_order,
    prediction_findings,
)


def arm(name: str, knn: float, linear: float, *, masked: str | None = None, alignment: float | None = None) -> Judged:
    accuracy = {"knn": knn, "linear": linear}
    return Judged(name=name, floor=masked is None, accuracy=accuracy, masked=masked, alignment=alignment, tokens="t")


def test_a_winning_floor_is_told_in_plain_words() -> None:
    told = floor_findings([arm("ours", 0.9, 0.99, masked="token"), arm("raw-pixels", 0.98, 0.5)], 360)
    assert told[0].startswith("**By k-NN a floor wins:** `raw-pixels`")
    assert "98.0\N{NO-BREAK SPACE}%" in told[0]
    assert "90.0\N{NO-BREAK SPACE}%" in told[0]
    assert "above every floor" in told[1]
    assert "Digits are easy" in told[2]


def test_a_narrow_win_of_a_floor_is_called_narrow() -> None:
    told = floor_findings([arm("ours", 0.95, 0.95, masked="token"), arm("raw-pixels", 0.955, 0.9)], 360)
    assert "a floor wins" in told[0]
    assert "cannot tell apart" in told[0]


def test_a_narrow_lead_over_a_floor_is_not_called_a_lead() -> None:
    told = floor_findings([arm("ours", 0.95, 0.95, masked="token"), arm("raw-pixels", 0.949, 0.95)], 360)
    assert all("no encoder clearly beats the floors" in sentence for sentence in told[:2])


def test_where_no_floor_keeps_up_nothing_is_called_easy() -> None:
    told = floor_findings([arm("ours", 0.95, 0.95, masked="token"), arm("raw-pixels", 0.5, 0.5)], 360)
    assert len(told) == 2
    assert all("above every floor" in sentence for sentence in told)


def test_tokens_are_compared_by_the_arm_that_the_score_chose_and_pixels_by_their_best() -> None:
    arms = [
        arm("chosen", 0.5, 0.5, masked="token", alignment=0.3),
        arm("lucky", 0.9, 0.9, masked="token", alignment=0.1),
        arm("plain", 0.7, 0.6, masked="pixel", alignment=0.0),
        arm("norm", 0.7, 0.7, masked="pixel", alignment=0.0),
    ]
    sentence = " ".join(answer(arms, 360))
    assert "(chosen, the vocabulary chosen" in sentence
    assert "(norm, the better" in sentence
    assert "lucky" not in sentence
    assert "**20.0 points less**" in sentence


def test_a_gap_within_noise_says_so() -> None:
    pair = [arm("a", 0.95, 0.9, masked="token", alignment=0.3), arm("b", 0.94, 0.9, masked="pixel", alignment=0.0)]
    _, by_knn, by_linear = answer(pair, 360)
    assert "**1.0 points more**, within the noise of 360 test images" in by_knn
    assert "**the same**" in by_linear


def test_equal_alignments_are_not_a_prediction() -> None:
    arms = [arm(n, 0.5, v, masked="pixel", alignment=0.0) for n, v in (("a", 0.1), ("b", 0.9))]
    assert prediction_findings(arms, 360) == []


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.2]), st.floats(0, 1)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=40)
def test_every_foreseen_pair_is_counted_once(pairs: list[tuple[float, float]]) -> None:
    arms = [arm(str(i), a, a, masked="token", alignment=score) for i, (score, a) in enumerate(pairs)]
    scores = [score for score, _ in pairs]
    total = sum(scores[i] != scores[j] for i in range(len(arms)) for j in range(i))
    for sentence in prediction_findings(arms, 360):
        numbers = [int(word) for word in sentence.replace(",", "").split() if word.isdigit()]
        assert numbers[0] == total == sum(numbers[1:4])
    order = predicted_order(arms)
    assert [scores[int(name)] for name in order] == sorted(scores, reverse=True)


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 1.0])
def test_noise_shrinks_with_images(accuracy: float) -> None:
    assert noise(accuracy, 400) == pytest.approx(noise(accuracy, 100) / 2)
