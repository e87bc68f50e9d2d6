"""`tokenizer fit`, as a function and as a command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clustermim.cli import run
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.errors import InputError
from clustermim.runs import read_manifest
from clustermim.tokenizers.tokenizer import load_tokenizer
from clustermim.verbs.align_tokens import fit_aligned, plan_alignment
from clustermim.verbs.tokenizer_fit import fit_tokenizer

DIGITS = DataOptions(limit=100)


def test_in_python_nothing_needs_to_be_written() -> None:
    tokenizer = fit_tokenizer("digits", "pixel", 10, options=DIGITS)
    assert (tokenizer.vocab_size, tokenizer.patch_size, tokenizer.channels, tokenizer.grid) == (10, 2, 1, (4, 4))
    assert tokenizer(torch.rand(2, 1, 8, 8)).shape == (2, 16)


def test_the_folder_holds_everything(tmp_path: Path) -> None:
    made = fit_tokenizer("digits", k=10, patch_size=4, out=tmp_path / "t", json=tmp_path / "t.json", options=DIGITS)
    again = load_tokenizer(tmp_path / "t")
    assert again.fingerprint() == made.fingerprint()
    manifest = read_manifest(tmp_path / "t")
    assert manifest["status"] == "finished" and manifest["kind"] == "tokenizer fit"
    assert manifest["data_fingerprint"] == again.facts["data_fingerprint"]
    assert manifest["tokenizer"] == made.fingerprint()
    assert json.loads((tmp_path / "t.json").read_text()) == made.rows()
    assert not (tmp_path / "t" / "lock").exists()


def test_its_config_repeats_it(tmp_path: Path) -> None:
    command = ["tokenizer", "fit", "--k", "6", "--patch-size", "4", "--seed", "3", "--limit", "80", "--features"]
    assert run([*command, "pixel?standardise=true", "--out", str(tmp_path / "a")]) == 0
    config = str(tmp_path / "a" / "config.yaml")
    assert run(["tokenizer", "fit", "--config", config, "--out", str(tmp_path / "b")]) == 0
    assert load_tokenizer(tmp_path / "a").fingerprint() == load_tokenizer(tmp_path / "b").fingerprint()


@pytest.mark.parametrize("kind", ["identity", "random", "random-centroids", "position", "oracle"])
def test_controls(tmp_path: Path, kind: str) -> None:
    arguments = ["tokenizer", "fit", "--kind", kind, "--k", "8", "--limit", "60", "--out", str(tmp_path / kind)]
    assert run(arguments) == 0
    assert load_tokenizer(tmp_path / kind).kind == kind


def test_out_is_needed_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tokenizer", "fit", "--data", "digits"]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_failed_fit_leaves_the_folder_free(tmp_path: Path) -> None:
    out = tmp_path / "t"
    with pytest.raises(InputError, match="distinct"):
        fit_tokenizer("digits", k=5000, out=out, options=DIGITS)
    assert not out.exists()
    fit_tokenizer("digits", k=5, out=out, options=DIGITS)


def test_what_is_there_is_never_touched(tmp_path: Path) -> None:
    out = tmp_path / "t"
    fit_tokenizer("digits", k=5, out=out, options=DIGITS)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("k: 5\n")
    (other / "manifest.json").write_text(json.dumps({"kind": "pretrain", "status": "running"}))
    for folder in (out, other):
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(InputError, match="--out"):
            fit_tokenizer("digits", k=5, out=folder, options=DIGITS)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_resume_loads_what_is_finished_and_repeats_what_is_not(tmp_path: Path) -> None:
    out = tmp_path / "t"
    made = fit_tokenizer("digits", k=5, out=out, options=DIGITS)
    assert fit_tokenizer("digits", k=5, out=out, resume=True, options=DIGITS).fingerprint() == made.fingerprint()
    manifest = json.loads((out / "manifest.json").read_text()) | {"status": "running"}
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "model.safetensors").unlink()
    assert fit_tokenizer("digits", k=5, out=out, resume=True, options=DIGITS).fingerprint() == made.fingerprint()
    assert load_tokenizer(out).fingerprint() == made.fingerprint()
    with pytest.raises(InputError, match="k: 5 then, 6 now"):
        fit_tokenizer("digits", k=6, out=out, resume=True, options=DIGITS)


def test_images_of_several_channels_from_a_file(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 65536, (20, 8, 12, 5), dtype=np.uint16)
    np.savez(tmp_path / "x.npz", x=x)
    arguments = ["tokenizer", "fit", "--data", str(tmp_path / "x.npz"), "--k", "6", "--patch-size", "4"]
    assert run([*arguments, "--out", str(tmp_path / "t")]) == 0
    made = load_tokenizer(tmp_path / "t")
    assert (made.channels, made.image_size, made.grid) == (5, (8, 12), (2, 3))


def test_aligning_gains_on_images_that_took_no_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tokenizer", "fit", "--k", "16", "--patch-size", "2", "--align-with", "labels", "--align-from", "120"]
    assert run([*command, "--out", str(tmp_path / "a"), "--json", str(tmp_path / "a.json")]) == 0
    assert "so the labels helped" in " ".join(capsys.readouterr().err.split())
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert row["kind"] == "aligned" and row["vocab_size"] == 16 and row["align_from"] == 120
    assert row["align_images"] + row["held_out_images"] == 1438
    assert 0 < row["held_out_gain_low"] < row["held_out_gain"] < row["held_out_gain_high"]
    assert row["held_out_gain"] == pytest.approx(row["held_out_alignment_aligned"] - row["held_out_alignment_plain"])
    made = load_tokenizer(tmp_path / "a")
    assert made.kind == "aligned" and not made.requires and made(torch.rand(2, 1, 8, 8)).shape == (2, 16)
    assert run(["tokenizer", "fit", "--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")]) == 0
    assert load_tokenizer(tmp_path / "b").fingerprint() == made.fingerprint()


def test_images_that_align_never_judge_and_groups_stay_together() -> None:
    source = open_source("digits")
    for images in (None, 300):
        plan = plan_alignment(source, 10, fine=None, images=images, kind="kmeans", seed=0)
        assert not set(plan.aligning.tolist()) & set(plan.judging.tolist()) and plan.fine == 200
        assert images is None or images - 5 <= len(plan.aligning) <= images
    source.groups = np.arange(len(source)) // 3
    plan = plan_alignment(source, 10, fine=50, images=None, kind="kmeans", seed=0)
    assert not set(source.groups[plan.aligning].tolist()) & set(source.groups[plan.judging].tolist())


def test_labels_of_the_judging_images_do_not_touch_the_tokens() -> None:
    made = []
    for turn in (False, True):
        source = open_source("digits", DataOptions(limit=400))
        plan = plan_alignment(source, 8, fine=60, images=None, kind="kmeans", seed=0)
        if turn:
            assert source.labels is not None
            source.labels[plan.judging] = source.labels[plan.judging][::-1]
        made.append(fit_aligned(source, plan, k=8, patch_size=2, batch_size=64, workers=None, device="cpu"))
    assert torch.equal(made[0].groups, made[1].groups)
    assert made[0].facts["held_out_gain"] != made[1].facts["held_out_gain"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--align-from", "100"], "add --align-with labels"),
        (["--align-with", "labels", "--kind", "position"], "--kind position"),
        (["--align-with", "labels", "--data", "digits#test"], "leave out #test"),
        (["--align-with", "labels", "--data", "digits#all"], "leave out #all"),
        (["--align-with", "labels", "--align-from", "8"], "--align-from 8 must be larger than --k 8"),
        (["--align-with", "labels", "--align-images", "2000"], "--align-images 2000"),
        (["--align-with", "labels", "--limit", "20"], "at least four of each class"),
    ],
)
def test_what_cannot_be_aligned_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    out = tmp_path / "t"
    assert run(["tokenizer", "fit", "--k", "8", "--out", str(out), *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split()) and not out.exists()


def test_aligning_needs_labels() -> None:
    with pytest.raises(InputError, match="labelled images"):
        fit_tokenizer(np.zeros((20, 8, 8), dtype=np.uint8), k=4, align_with="labels")
