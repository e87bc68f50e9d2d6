"""`tokenizer fit`, as a function and as a command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clustermim.cli import run
from clustermim.data.options import DataOptions
from clustermim.errors import InputError
from clustermim.runs import read_manifest
from clustermim.tokenizers.tokenizer import load_tokenizer
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
