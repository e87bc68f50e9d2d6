"""The demo, shrunk to seconds: every step runs, resumes, and ends in a page and a table that agree."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clustermim.errors import InputError
from clustermim.verbs.run_demo import CONTROLS, VOCABULARIES, demo


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    demo(out=folder, epochs=1, bootstrap=0, limit=300)
    return folder


def test_every_step_leaves_its_files(out: Path) -> None:
    assert {path.name for path in (out / "tokenizers").iterdir()} == {*VOCABULARIES, *CONTROLS}
    assert len(list((out / "runs").glob("*/encoder.safetensors"))) == 4
    assert json.loads((out / "manifest.json").read_text())["status"] == "finished"


def test_the_ranking_was_written_before_any_training(out: Path) -> None:
    written = (out / "predictions.json").stat().st_mtime
    assert all(written <= run.stat().st_mtime for run in (out / "runs").glob("*/metrics.jsonl"))
    ranking = json.loads((out / "predictions.json").read_text())["ranking"]
    assert [row["place"] for row in ranking] == [1, 2, 3, 4]
    assert sorted(ranking, key=lambda row: -row["alignment"]) == ranking


def test_the_page_stands_alone_and_tells_the_table(out: Path) -> None:
    page = (out / "report.html").read_text()
    loads: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            loads.extend(value or "" for name, value in attrs if name == "src" or (tag == "link" and name == "href"))

    Reader().feed(page)
    assert all(value.startswith("data:") for value in loads)
    for name in (*VOCABULARIES, *CONTROLS, "raw-pixels"):
        assert name in page


def test_a_finished_demo_is_read_again_but_not_overwritten(out: Path) -> None:
    before = (out / "report.html").read_bytes()
    again = demo(out=out, epochs=1, bootstrap=0, limit=300, resume=True)
    assert again.report == out / "report.html" and again.report.read_bytes() == before
    encoders = [row for row in again.rows() if row["row"] == "encoder"]
    assert len(encoders) == 7 and all(0 <= row["knn"] <= 1 and 0 <= row["linear"] <= 1 for row in encoders)
    with pytest.raises(InputError, match="finished"):
        demo(out=out, epochs=1, bootstrap=0, limit=300)


def test_the_controls_score_as_they_must(out: Path) -> None:
    scores = {
        row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"] if row["row"] == "tokenizer"
    }
    assert scores["oracle"]["alignment_crossfit"] == pytest.approx(1.0)
    assert scores["identity"]["alignment_crossfit"] == pytest.approx(0.0, abs=1e-9)
    assert scores["identity"]["alignment"] == pytest.approx(1.0)  # what plain counting would have believed
