"""The demo is a study: its options change the recipe, and the whole of it runs by its own command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from study_samples import planned

from clustermim.errors import InputError
from clustermim.studies.demo_command import demo, recipe_changes
from clustermim.studies.pieces import Plan
from clustermim.studies.reading import read_recipe
from clustermim.studies.recipe import CONTROLS
from page_checker import check


def plan_of(**options: int) -> Plan:
    return planned(read_recipe("demo", changes=recipe_changes(**options)))[2]


def test_without_options_it_is_the_recipe_and_options_lie_over_it() -> None:
    assert recipe_changes() == []
    plain, changed = plan_of(), plan_of(epochs=2, bootstrap=30, limit=300)
    assert {cell.settings["epochs"] for cell in changed.cells} == {2}
    assert {p.settings["bootstrap"] for p in changed.pieces.values() if p.kind == "score"} == {30}
    assert not set(plain.pieces) & set(changed.pieces)  # other images
    assert [cell.name for cell in plain.cells] == [cell.name for cell in changed.cells]


def test_the_seed_decides_everything_that_is_random() -> None:
    plan = plan_of(seed=7)
    drawn = [piece for piece in plan.pieces.values() if piece.kind != "predict"]
    assert {piece.settings["seed"] for piece in drawn} == {7}
    assert plan_of(seed=0).pieces.keys() == plan_of().pieces.keys()


def test_every_encoder_has_the_same_budget_and_controls_are_scored() -> None:
    plan = plan_of()
    assert len({cell.setting for cell in plan.cells}) == 1
    assert {t.kind for t in plan.tokens if t.control} == set(CONTROLS)
    assert {cell.settings["target"] for cell in plan.cells} == {"token", "pixel"}


def test_what_cannot_be_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no study"):
        demo(out=tmp_path)
    with pytest.raises(InputError, match="--epochs must be at least 1"):
        demo(out=tmp_path / "new", epochs=0)
    with pytest.raises(InputError, match="--bootstrap must be at least 0"):
        demo(out=tmp_path / "new", bootstrap=-1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_the_command_ends_with_the_path_of_the_page_and_can_be_repeated(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "clustermim", "demo", "--out", str(tmp_path / "demo"), "--epochs", "1"]
    words += ["--limit", "150", "--bootstrap", "20", "--device", "cpu", "--json", str(tmp_path / "rows.json")]
    first = subprocess.run(words, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    page = Path(first.stdout.rstrip().splitlines()[-1])
    assert page == tmp_path / "demo" / "report.html"
    found = check(page.read_text())
    text = " ".join(" ".join(found.text).split())
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows:
        assert row["name"] in text
    assert len(re.findall("An illustration, no evidence", text)) == 1
    assert len(found.images) > 50  # maps and vocabularies
    scores = {row["name"]: row for row in rows if row["row"] == "tokenizer"}
    assert scores["oracle"]["alignment_crossfit"] == pytest.approx(1.0)
    assert scores["identity"]["alignment_crossfit"] == pytest.approx(0.0, abs=1e-9)
    assert scores["identity"]["alignment"] == pytest.approx(1.0)  # what plain counting would have believed
    assert subprocess.run(words, capture_output=True).returncode == 2
    before = (tmp_path / "demo" / "journal.jsonl").read_bytes()
    assert subprocess.run([*words, "--resume"], capture_output=True).returncode == 0
    assert (tmp_path / "demo" / "journal.jsonl").read_bytes() == before
