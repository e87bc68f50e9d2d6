"""The demo, shrunk to seconds: every step runs, resumes, and ends in a page and a table that agree."""

import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App
from rich.console import Console

from clustermim.errors import InputError
from clustermim.verbs.demo_commands import command
from clustermim.verbs.pretrain_encoder import pretrain
from clustermim.verbs.probe_encoders import probe
from clustermim.verbs.run_demo import CONTROLS, VOCABULARIES, DemoResult, demo
from clustermim.verbs.score import tcas
from clustermim.verbs.tokenizer_fit import fit_tokenizer
from clustermim.verbs.tokenizer_show import show_tokenizer
from page_checker import check

SMALL: dict[str, Any] = {"epochs": 1, "bootstrap": 20, "limit": 100}
FUNCTIONS = {
    "tokenizer fit": fit_tokenizer,
    "tokenizer show": show_tokenizer,
    "tcas": tcas,
    "pretrain": pretrain,
    "probe": probe,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return demo(out=tmp_path_factory.mktemp("demo") / "demo", **SMALL)


@pytest.fixture(scope="module")
def out(made: DemoResult) -> Path:
    return made.report.parent


def test_every_step_leaves_its_files(out: Path) -> None:
    assert {path.name for path in (out / "tokenizers").iterdir()} == {*VOCABULARIES, *CONTROLS}
    assert len(list((out / "runs").glob("*/encoder.safetensors"))) == 4
    assert json.loads((out / "manifest.json").read_text())["status"] == "finished"


def test_the_ranking_was_written_before_any_training(out: Path) -> None:
    written = (out / "predictions.json").stat().st_mtime
    assert all(written <= run.stat().st_mtime for run in (out / "runs").glob("*/config.yaml"))
    ranking = json.loads((out / "predictions.json").read_text())["ranking"]
    assert [row["place"] for row in ranking] == [1, 2, 3, 4]
    assert sorted(ranking, key=lambda row: -row["alignment"]) == ranking


def test_every_encoder_had_the_same_budget(out: Path) -> None:
    budgets = set()
    for run in (out / "runs").iterdir():
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        budgets.add((last["step"], last["images"]))
    assert len(budgets) == 1


def test_the_page_stands_alone_and_tells_what_the_table_tells(made: DemoResult) -> None:
    page = made.report.read_text()
    found = check(page)
    text = " ".join(found.text)
    for name in (*VOCABULARIES, *CONTROLS, *(j.name for j in made.judged)):
        assert name in text
    for j in made.judged:
        for accuracy in j.accuracy.values():
            assert f"{100 * accuracy:.1f}" in text
    # The maps of ten images and every token of two vocabularies.
    sizes = {s.name: s.vocab_size for s in made.scored}
    assert len(found.images) == 20 + sizes["pixel-50"] + sizes[made.chosen]


def test_the_table_ends_with_the_path_of_the_page(made: DemoResult) -> None:
    text = io.StringIO()
    Console(file=text, width=160).print(made)
    assert text.getvalue().rstrip().splitlines()[-1] == str(made.report)
    assert all(s.name in text.getvalue() for s in made.scored)


def test_controls_score_as_they_must(made: DemoResult) -> None:
    scores = {s.name: s for s in made.scored}
    assert scores["oracle"].alignment_crossfit == pytest.approx(1.0)
    assert scores["identity"].alignment_crossfit == pytest.approx(0.0, abs=1e-9)
    assert scores["identity"].alignment == pytest.approx(1.0)  # what plain counting would have believed
    assert made.chosen in VOCABULARIES


def test_the_commands_on_the_page_are_commands(made: DemoResult) -> None:
    """Each is parsed by the verb's own signature, as the command line would."""
    lines = [text for text in check(made.report.read_text()).text if text.startswith("clustermim ") and " --" in text]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line)[1:]
        verb = next(verb for verb in FUNCTIONS if words[: len(verb.split())] == verb.split())
        app = App(result_action="return_value")
        app.default(FUNCTIONS[verb])
        parsed = app.parse_args(words[len(verb.split()) :], exit_on_error=False, print_error=False)
        assert parsed[0] is FUNCTIONS[verb]


def test_a_finished_demo_is_read_again_but_never_overwritten(made: DemoResult, out: Path) -> None:
    before = made.report.read_bytes()
    again = demo(out=out, **SMALL, resume=True)
    assert again.rows() == made.rows()
    assert made.report.read_bytes() == before
    with pytest.raises(InputError, match="finished"):
        demo(out=out, **SMALL)


def test_a_stopped_demo_is_finished_without_repeating_what_is_done(made: DemoResult, out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    for name in ("results.json", "report.html", "probe.json"):
        (out / name).unlink()
    with pytest.raises(InputError, match="--resume"):
        demo(out=out, **SMALL)
    kept = {path: path.stat().st_mtime for path in out.glob("*/*/*.safetensors")}
    assert len(kept) == len(VOCABULARIES) + len(CONTROLS) + 2 * 4
    again = demo(out=out, **SMALL, resume=True)
    assert again.rows() == made.rows()
    assert again.report.exists()
    assert {path: path.stat().st_mtime for path in kept} == kept


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="no run of ours"):
        demo(out=tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="--epochs"):
        demo(out=tmp_path / "new", epochs=0)


def test_a_command_is_what_a_shell_reads_back() -> None:
    options = {"features": "pixel?context=4", "k": 5, "norm_pix": False, "out": None, "tokenizer": ["x", "y"]}
    assert shlex.split(command("tokenizer fit", data="a b", **options)) == [
        *("clustermim", "tokenizer", "fit", "--data", "a b", "--features", "pixel?context=4", "--k", "5"),
        *("--no-norm-pix", "--tokenizer", "x", "y"),
    ]
