"""`clustermim tcas` as it is used: on tokenizers and images, on stored ids, and on what cannot be scored."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from clustermim.cli import run
from clustermim.errors import InputError
from clustermim.scoring.tcas import score_tokens
from clustermim.verbs.score import tcas
from clustermim.verbs.tokenize_images import tokenize
from clustermim.verbs.tokenizer_fit import fit_tokenizer

CONTROLS = ("identity", "random", "oracle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits tokenizers in folders: K-means and the controls that bracket it."""
    home = tmp_path_factory.mktemp("tokenizers")
    fit_tokenizer("digits", k=16, patch_size=2, out=home / "pixel-16")
    for kind in CONTROLS:
        fit_tokenizer("digits", k=16, patch_size=2, kind=kind, out=home / kind)
    return home


def text_of(result):
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(result)
    return console.export_text()


def test_one_pass_brackets_the_tokens_by_the_controls(folder, tmp_path):
    result = tcas(
        [folder / name for name in ("pixel-16", *CONTROLS)],
        bootstrap=20,
        json=tmp_path / "scores.json",
        html=tmp_path / "scores.html",
    )
    score = {name: result.scores[name] for name in result.scores}
    assert score["identity"].alignment == 1 and score["identity"].alignment_crossfit == 0
    assert abs(score["random"].alignment_crossfit) < 0.005
    assert score["oracle"].alignment_crossfit == pytest.approx(1, abs=1e-12)
    assert 0.02 < score["pixel-16"].alignment_crossfit < 0.9
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [row["tokenizer"] for row in rows] == list(score)
    assert rows[0]["alignment_crossfit_low"] < rows[0]["alignment_crossfit"] < rows[0]["alignment_crossfit_high"]
    assert all(not isinstance(value, list | dict) for row in rows for value in row.values())
    page = (tmp_path / "scores.html").read_text()
    assert page.startswith("<!doctype html>") and "pixel-16" in page and "Confused with" in page
    shown = text_of(result)
    assert shown.index("alignment") < shown.index("TCAS walk") < shown.index("TCAS rows") < shown.index("TCAS cosine")
    assert "pixel-16 (K=16): alignment" in shown and result.controls == set(CONTROLS)


def test_stored_ids_score_as_their_images_do(folder, tmp_path):
    tokenize(folder / "pixel-16", out=tmp_path / "ids.npz")
    from_ids = tcas(ids=tmp_path / "ids.npz", bootstrap=0)
    from_images = tcas(folder / "pixel-16", bootstrap=0)
    held = np.load(tmp_path / "ids.npz")
    alone = score_tokens(held["ids"], held["labels"], vocab_size=16)
    for result in (from_ids.scores["ids"], from_images.scores["pixel-16"]):
        assert result.alignment_crossfit == pytest.approx(alone.alignment_crossfit, abs=1e-12)
        assert result.vocab_size == 16


def test_a_learning_curve_goes_into_table_rows_and_page(folder, tmp_path):
    page = tmp_path / "curve.html"
    result = tcas([folder / "pixel-16", folder / "random"], bootstrap=0, curve=True, html=page)
    assert list(result.curves) == ["pixel-16"]
    points = [row for row in result.rows() if "curve_images" in row]
    assert [row["curve_images"] for row in points] == [point.images for point in result.curves["pixel-16"]]
    assert points[-1]["curve_images"] == 1438 and len(result.rows()) == 2 + len(points)
    assert "How many labels are enough" in page.read_text() and "for pixel-16" in text_of(result)


def test_agreement_without_labels_stands_alone_or_beside_the_scores(folder):
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    alone = tcas(folder / "pixel-16", images, label_free=True)
    (row,) = alone.rows()
    assert row["agreement_images"] == 40 and "alignment" not in row and "experimental" in text_of(alone)
    beside = tcas([folder / "pixel-16", folder / "oracle"], bootstrap=0, label_free=True)
    assert beside.agreements["oracle"].view_agreement == pytest.approx(1)
    assert {"alignment", "view_agreement"} <= beside.rows()[0].keys() and "experimental" in text_of(beside)


def test_tokenizers_of_one_name_are_told_apart(folder):
    result = tcas([folder / "oracle", folder / "oracle"], bootstrap=0)
    assert len(result.scores) == 2


def test_the_command_line_prints_the_table_and_writes_the_files(folder, tmp_path, capsys):
    arguments = ["tcas", "--tokenizer", str(folder / "pixel-16"), str(folder / "random"), "--data", "digits"]
    assert run([*arguments, "--bootstrap", "10", "--json", str(tmp_path / "s.json")]) == 0
    printed = capsys.readouterr().out
    assert "pixel-16" in printed and "alignment" in printed
    assert len(json.loads((tmp_path / "s.json").read_text())) == 2
    assert run([*arguments, "--no-crossfit", "--bootstrap", "0"]) == 0
    assert "plug-in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to score"),
        ({"tokenizer": "x", "ids": Path("y")}, "either --ids"),
        ({"ids": Path("none.npz")}, "no stored ids"),
        ({"ids": Path("none.npz"), "label_free": True}, "two views"),
        ({"tokenizer": "none"}, "not there"),
        ({"tokenizer": "x", "bootstrap": 1}, "bootstrap"),
        ({"tokenizer": "x", "html": Path("/tmp")}, "is a folder"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_work(options, message):
    with pytest.raises(InputError, match=message):
        tcas(**options)


def test_unlabelled_images_and_other_grids_are_refused(folder):
    images = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    with pytest.raises(InputError, match="label"):
        tcas(folder / "pixel-16", images)
    with pytest.raises(InputError, match="channel"):
        tcas(folder / "pixel-16", (images, np.arange(12) % 2), options=_channels(3))


def _channels(number):
    from clustermim.data.options import DataOptions

    return DataOptions(channels=number)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ids": np.full((6, 4), 5)}, "token 5, outside [0, 5)"),
        ({"ids": np.full((6, 4), -1)}, "token -1, outside [0, 5)"),
        ({"labels": np.array([0, 0, 1, 1, -1, 0])}, "negative values"),
        ({"labels": np.array([0, 1, 0])}, "6 images have ids but `labels` has 3"),
        ({"labels": np.array([0, 1, 0, 1, np.nan, 0])}, "NaN"),
        ({"labels": np.zeros(6, dtype=int)}, "All 6 images have class 0"),
    ],
)
def test_stored_ids_that_cannot_be_scored_are_told_on_the_command_line(tmp_path, capsys, change, told):
    good = {"ids": np.arange(24).reshape(6, 4) % 5, "labels": np.array([0, 1, 0, 1, 1, 0]), "vocab_size": 5}
    np.savez(tmp_path / "ids.npz", **(good | change))
    assert run(["tcas", "--ids", str(tmp_path / "ids.npz")]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_class_with_a_single_image_is_plug_in_only_and_told_on_the_command_line(tmp_path, capsys):
    np.savez(tmp_path / "ids.npz", ids=np.arange(24).reshape(6, 4) % 5, labels=np.array([0, 0, 1, 1, 2, 0]))
    assert run(["tcas", "--ids", str(tmp_path / "ids.npz")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "single image" in printed and "plug-in" in printed


@pytest.mark.slow
def test_two_processes_write_and_print_the_scores_of_one_once(folder, tmp_path):
    line = [sys.executable, "-m", "clustermim", "tcas", "--tokenizer", str(folder / "pixel-16"), "--limit", "60"]
    files = [tmp_path / f"{devices}.json" for devices in (1, 2)]
    told = [
        subprocess.run(
            [*line, "--bootstrap", "5", "--device", "cpu", "--devices", str(devices), "--json", str(file)],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        for devices, file in enumerate(files, start=1)
    ]
    assert told[0].count("Tokens against") == told[1].count("Tokens against") == 1
    rows = [json.loads(file.read_text())[0] for file in files]
    for row in rows:
        del row["seconds_tokenizing"], row["seconds_counting"]
    assert rows[0] == rows[1]
