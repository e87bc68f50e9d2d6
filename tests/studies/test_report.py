"""The page of a study: whole, self-contained, and usable with mouse and keyboard in a real browser without network."""

import csv
import html
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from cyclopts import App
from study_samples import run_here, small_recipe, write_images

from clustermim.studies.answers import CHOICES, answer, main_setting, scopes
from clustermim.studies.collecting import Findings, collect
from clustermim.studies.steps import command
from clustermim.studies.tables import findings_tables
from clustermim.studies.telling import headline
from clustermim.studies.writing import write_findings
from clustermim.verbs.pretrain_encoder import pretrain
from clustermim.verbs.probe_encoders import probe
from clustermim.verbs.score import tcas
from clustermim.verbs.tokenizer_fit import fit_tokenizer
from clustermim.verbs.tokenizer_show import show_tokenizer
from page_checker import check

VERBS = {
    "tokenizer fit": fit_tokenizer,
    "tokenizer show": show_tokenizer,
    "tcas": tcas,
    "pretrain": pretrain,
    "probe": probe,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Findings]:
    home = tmp_path_factory.mktemp("report")
    values = small_recipe(
        write_images(home, light=50),
        tokenizers={"pixel": {"k": [4, 8, 16], "max_passes": 2, "n_init": 1}},
        targets={
            "clustermim": {"tokenizer": "*"},
            "mae": {"target": "pixel"},
            "hog": {"target": "feature", "features": "hog"},
        },
        compare={"ours": "clustermim pixel-k4", "theirs": ["mae", "hog"], "seeds": [0, 1]},
        shown=["pixel-k8"],
    )
    recipe, sources, plan, folder = run_here(values, home / "s")
    findings = collect(plan, folder, recipe)
    write_findings(findings, plan, folder, sources, recipe, command="clustermim study small --out DIR")
    return folder.path, findings


def test_a_study_continued_elsewhere_names_all_that_made_it(tmp_path: Path) -> None:
    recipe, sources, plan, folder = run_here(small_recipe(write_images(tmp_path, light=50)), tmp_path / "s")
    trainings = [i for i, piece in plan.pieces.items() if piece.kind == "pretrain"]
    for identity in trainings:
        file = folder.piece(identity) / "result.json"
        record = json.loads(file.read_text())
        record["made_by"] |= {"git": "0123456789ab", "versions": record["made_by"]["versions"] | {"torch": "1.0.0"}}
        record["made_by"]["hardware"] |= {"gpus": ["A GPU", "A GPU"]}
        file.write_text(json.dumps(record))
    write_findings(collect(plan, folder, recipe), plan, folder, sources, recipe, command="clustermim study small")

    made_by = json.loads((folder.path / "results.json").read_text())["made_by"]
    assert sum(n for maker in made_by["makers"] for n in maker["pieces"].values()) == len(plan.pieces)
    (other,) = [maker for maker in made_by["makers"] if maker["git"] == "0123456789ab"]
    assert other["pieces"] == {"pretrain": len(trainings)}
    page = html.unescape((folder.path / "report.html").read_text())
    told = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page))
    assert "2 × A GPU" in told["hardware"]
    assert "and 1.0.0" in told["versions"]
    assert f"0123456789ab ({len(trainings)} pieces)" in told["git revision of the working folder"]


def test_the_page_is_whole_and_opens_with_the_answer(made: tuple[Path, Findings]) -> None:
    folder, findings = made
    page = (folder / "report.html").read_text()
    found = check(page)
    text = " ".join(" ".join(found.text).split())
    assert text.index("Spearman") < text.index("Which target to pretrain on", text.index("Spearman"))
    for row in findings.runs:
        assert row.name in text
        for accuracy in row.accuracy.values():
            assert f"{100 * accuracy:.1f}" in text
    assert "clustermim study small --out DIR" in text
    assert len(found.images) > 8


def test_files_hold_what_the_page_tells(made: tuple[Path, Findings]) -> None:
    folder, findings = made
    results = json.loads((folder / "results.json").read_text())
    rows = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert len(rows) == len(results["rows"]) == len(findings.tokens) + len(findings.runs) + len(findings.floors)
    encoders = [row for row in rows if row["row"] == "encoder"]
    assert [float(row["linear"]) for row in encoders] == [row.accuracy["linear"] for row in findings.runs]
    assert results["pairs"] and results["correlations"] and results["sweeps"]
    stems = {file.stem for file in (folder / "figures").glob("*.png")}
    assert stems == {file.stem for file in (folder / "figures").glob("*.svg")}
    assert {"tiny-accuracy", "tiny-ranking-linear", "tiny-k-linear"} <= stems


def test_scopes_leave_controls_and_pixels_out_where_they_say_so(made: tuple[Path, Findings]) -> None:
    _, findings = made
    found = scopes(findings, main_setting(findings.runs))
    assert {row.name for row in found[CHOICES]} == {f"clustermim pixel-k{k}" for k in (4, 8, 16)}
    assert found.keys() == {"all targets", CHOICES, "K sweep of pixel"}


def test_the_better_rival_is_chosen_on_validation_images(made: tuple[Path, Findings]) -> None:
    _, findings = made
    means: dict[str, list[float]] = {}
    for row in findings.runs:
        means.setdefault(row.name, []).append(row.validation or 0.0)
    best = max(("mae", "hog"), key=lambda name: sum(means[name]) / len(means[name]))
    pairs = answer(findings).pairs
    assert {pair.theirs for pair in pairs} == {best}
    assert all(pair.difference.pairs == 2 and pair.difference.low is not None for pair in pairs)
    assert headline(findings, answer(findings))
    assert findings_tables(findings).renderables


def test_the_commands_on_the_page_are_commands(made: tuple[Path, Findings]) -> None:
    """Each is parsed by the verb's own signature, as the command line would."""
    found = re.findall(r"<pre><code>(.*?)</code></pre>", (made[0] / "report.html").read_text())
    lines = [line for text in found if "mine/" in (line := html.unescape(re.sub("<[^>]*>", "", text)))]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line)[1:]
        verb = next(verb for verb in VERBS if words[: len(verb.split())] == verb.split())
        app = App(result_action="return_value")
        app.default(VERBS[verb])
        parsed = app.parse_args(words[len(verb.split()) :], exit_on_error=False, print_error=False)
        assert parsed[0] is VERBS[verb]
    assert "--k 8" in lines[0] or "--k 4" in lines[0] or "--k 16" in lines[0]
    assert "--no-flip" in lines[3] and "--crop-scale 0.8 1.0" in lines[3]


def test_a_command_is_what_a_shell_reads_back() -> None:
    options = {"features": "pixel?context=4", "k": 5, "norm_pix": False, "out": None, "tokenizer": ["x", "y"]}
    assert shlex.split(command("tokenizer fit", data="a b", crop_scale=(0.5, 1.0), **options)) == [
        *("clustermim", "tokenizer", "fit", "--data", "a b", "--crop-scale", "0.5", "1.0"),
        *("--features", "pixel?context=4", "--k", "5", "--no-norm-pix", "--tokenizer", "x", "y"),
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_works_in_a_browser_without_network(made: tuple[Path, Findings], width: int) -> None:
    page = made[0] / "report.html"
    with Browser(width) as browser:
        browser.open(page)
        assert browser.problems == []
        assert {url.split(":")[0] for url in browser.requests} == {"file", "data"}
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        _sorts(browser)
        _filters(browser)
        _hovers(browser)
        _walks_by_keyboard(browser)
        browser.prefer("dark")
        dark, ink = browser.run(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert _lightness(dark) < 60 < 180 < _lightness(ink)
        assert browser.problems == []


def _column(browser: Browser, number: int) -> list[Any]:
    found: list[Any] = browser.run(
        f"[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[{number}].dataset.value ?? null)"
    )
    return found


def _sorts(browser: Browser) -> None:
    before = _column(browser, 1)
    browser.run("document.querySelector('thead').rows[0].cells[1].querySelector('button').click()")
    down = [float(value) for value in _column(browser, 1)]
    assert down == sorted(map(float, before), reverse=True)
    browser.run("document.querySelector('thead').rows[0].cells[1].querySelector('button').click()")
    assert [float(value) for value in _column(browser, 1)] == down[::-1] or len(set(down)) < len(down)


def _filters(browser: Browser) -> None:
    shown = (
        "[...document.querySelector('.filtered tbody').rows].filter(r => !r.hidden).map(r => r.cells[0].textContent)"
    )
    everything = browser.run(shown)
    browser.run("document.querySelector('.filtered input').focus()")
    browser.write("pixel-K8 clustermim")
    assert browser.run(shown) == ["clustermim pixel-k8"]
    assert browser.run("document.querySelector('.filtered output').textContent").startswith("1 of ")
    browser.run(
        "(f => { f.value = ''; f.dispatchEvent(new Event('input')); })(document.querySelector('.filtered input'))"
    )
    assert sorted(browser.run(shown)) == sorted(everything)


def _hovers(browser: Browser) -> None:
    told = "document.querySelector('.scatter .told').textContent"
    assert browser.run("document.querySelectorAll('.scatter .mark').length") == 5
    browser.point_at("document.querySelectorAll('.scatter .mark')[4]")
    assert "clustermim pixel" in browser.run(told)
    browser.run(
        "(s => { s.value = 'nmi'; s.dispatchEvent(new Event('change')); })(document.querySelector('[data-axis=x]'))"
    )
    assert browser.run("document.querySelector('.scatter svg').getAttribute('aria-label')").endswith("against NMI")


def _walks_by_keyboard(browser: Browser) -> None:
    told = "document.querySelector('.scatter .told').textContent"
    browser.run("document.querySelector('[data-axis=y]').focus()")
    browser.press("Tab")
    first = browser.run(told)
    assert browser.run("document.activeElement.classList.contains('mark')")
    browser.press("ArrowRight")
    assert browser.run(told) != first
    browser.press("ArrowLeft")
    assert browser.run(told) == first
    browser.run("document.querySelector('thead button').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('thead th').getAttribute('aria-sort')") == "ascending"


def _lightness(colour: str) -> float:
    return sum(map(float, colour.strip("rgb()").split(","))) / 3
