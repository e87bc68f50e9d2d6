"""Encoders that are judged on data they were not pretrained on: order, cost, and floors that are done once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from study_samples import findings, run, run_here, small_recipe, write_images

from clustermim.studies.answers import answer
from clustermim.studies.carrying import Carried, carried
from clustermim.studies.collecting import Findings, FloorRow, RunRow, collect
from clustermim.studies.telling import carried_sentence, headline
from clustermim.studies.writing import write_findings


def judged(data: str, judged_on: str, values: dict[str, list[float]]) -> list[RunRow]:
    """Encoders of one data set on another; an accuracy a seed."""
    return [
        replace(run(name, value), data=data, judged_on=judged_on, seed=seed)
        for name, seeds in values.items()
        for seed, value in enumerate(seeds)
    ]


ACCURACIES = st.lists(
    st.tuples(*[st.integers(1, 99) for _ in range(3)]),
    min_size=3,
    max_size=7,
    unique_by=(lambda t: t[0], lambda t: t[1]),
)


@given(ACCURACIES)
def test_order_and_cost_are_those_of_a_plain_computation(values: list[tuple[int, int, int]]) -> None:
    home, away, native = ({f"t{n}": [one[i] / 100] for n, one in enumerate(values)} for i in range(3))
    found = carried(findings([*judged("a", "a", home), *judged("a", "b", away), *judged("b", "b", native)], {}))
    assert [(one.data, one.judged_on) for one in found] == [("a", "b")]
    (one,) = found
    assert one.order is not None
    expected = stats.spearmanr([v[0] for v in values], [v[1] for v in values]).statistic
    assert one.order.spearman == pytest.approx(expected)
    assert one.costs == pytest.approx({f"t{n}": v[2] - v[1] for n, v in enumerate(values)})
    row = one.row()
    assert row["cost_low"] <= row["cost"] <= row["cost_high"]


def test_a_cost_is_over_seeds_that_both_have() -> None:
    found = carried(
        findings([*judged("a", "b", {"t": [0.5, 0.9]}), *judged("b", "b", {"t": [0.6], "other": [0.1]})], {})
    )
    assert len(found) == 1 and found[0].order is None
    assert found[0].costs == pytest.approx({"t": 10.0})


def test_nothing_is_carried_where_all_is_judged_on_its_own_data() -> None:
    assert carried(findings(judged("a", "a", {"t": [0.5], "u": [0.6]}), {})) == []


def orders(low: float | None, high: float | None, costs: dict[str, float] | None = None) -> str:
    found = carried(findings([*judged("a", "a", {n: [v] for n, v in TARGETS}), *judged("a", "b", dict(AWAY))], {}))
    order = found[0].order
    assert order is not None
    return carried_sentence(
        replace(found[0], order=replace(order, spearman_low=low, spearman_high=high), costs=costs or {})
    )


TARGETS = [("t", 0.5), ("u", 0.6), ("v", 0.7)]
AWAY = [("t", [0.4]), ("u", [0.5]), ("v", [0.3])]


def test_a_sentence_says_what_the_interval_says() -> None:
    assert "**carries over** to b" in orders(0.2, 1.0)
    assert "**does not clearly carry over** to b" in orders(-0.2, 1.0)
    assert "**is turned round** on b" in orders(-1.0, -0.3)
    assert "**cannot be told** by linear probe" in orders(None, None)
    told = orders(0.2, 1.0, {"t": 1.0, "u": -0.5, "v": 2.5})
    assert "**1.0 points below** those pretrained on b itself (mean of 3 targets, −2.5 to 0.5)" in told
    assert "points above" in orders(0.2, 1.0, {"t": -1.0})
    assert carried_sentence(Carried(data="a", judged_on="b", protocol="knn", order=None, costs={"t": 3.0})) == (
        "Pretrained on a, encoders lie **3.0 points below** those pretrained on b itself."
    )


def test_many_judgements_leave_scores_and_pairs_to_their_sections() -> None:
    values = {"t": [0.5], "u": [0.6], "v": [0.7]}
    runs = [row for a in "ab" for b in "ab" for row in judged(a, b, values)]
    told = headline(found := findings(runs, {}), answer(found))
    assert sum("comes first" in line for line in told) == 4
    assert sum("carries over" in line or "carry over" in line or "cannot be told" in line for line in told) == 2
    assert len(told) == 6


def test_floors_without_tokens_are_told_once() -> None:
    floors = [
        FloorRow(data=data, judged_on="b", name=name, of_tokens=of_tokens, accuracy={"linear": 0.5})
        for data in "ab"
        for name, of_tokens in (("raw-pixels", False), ("bag-of-tokens:t", True))
    ]
    found: Findings = replace(findings([], {}), floors=floors)
    assert [(floor.data, floor.name) for floor in found.floors_once] == [
        ("b", "raw-pixels"),
        ("a", "bag-of-tokens:t"),
        ("b", "bag-of-tokens:t"),
    ]
    assert sum(row["row"] == "floor" for row in found.rows()) == 3


def test_a_study_that_judges_crosswise(tmp_path: Path) -> None:
    one, other = (write_images(tmp_path / name, light=light) for name, light in (("one", 120), ("other", 80)))
    view: dict[str, Any] = {"flip": False, "crop_scale": [0.8, 1.0], "judge": ["a", "b"]}
    values = small_recipe(one, data={"a": {"source": str(one), **view}, "b": {"source": str(other), **view}})
    values["floors"] = ["raw-pixels", "bag-of-tokens:pixel-k4"]
    recipe, sources, plan, folder = run_here(values, tmp_path / "study")
    probes = [piece for piece in plan.pieces.values() if piece.kind == "probe"]
    assert sum("raw-pixels" in piece.name for piece in probes) == 2  # one for each that is judged
    assert sum("bag-of-tokens" in piece.name for piece in probes) == 4  # whose tokens differ
    found = collect(plan, folder, recipe)
    answers = answer(found)
    assert {(c.data, c.judged_on) for c in answers.carried} == {("a", "b"), ("b", "a")}
    assert all(len(c.costs) == 3 for c in answers.carried)
    write_findings(found, plan, folder, sources, recipe, command="c")
    page = (folder.path / "report.html").read_text()
    assert "What carries over" in page and "a after pretraining on b" in page
    told = json.loads((folder.path / "results.json").read_text())
    assert [one["judged_on"] for one in told["carried"]] == ["b", "b", "a", "a"]  # by k-NN and by linear probe
