"""`tokenizer fit --kind vqvae` from the outside: what it leaves behind, what it survives, what it refuses."""

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from clustermim.cli import run
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.errors import InputError
from clustermim.runs import read_manifest, read_metrics
from clustermim.tokenizers.tokenizer import load_tokenizer
from clustermim.tokenizers.vqvae.training import VQVAEConfig
from clustermim.verbs.token_views import look_at_tokens
from clustermim.verbs.tokenizer_fit import fit_tokenizer

FIT = ["tokenizer", "fit", "--kind", "vqvae", "--device", "cpu"]
TINY = [*FIT, "--k", "10", "--patch-size", "4", "--limit", "120", "--batch-size", "32"]
TINY += ["--epochs", "4", "--width", "8", "--depth", "1", "--code-dim", "4", "--log-every", "1"]
TINY += ["--checkpoint-every", "5"]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of 12 steps."""
    out = tmp_path_factory.mktemp("fits") / "whole"
    assert run([*TINY, "--out", str(out)]) == 0
    return out


def test_what_a_fit_leaves_behind(whole: Path, tmp_path: Path) -> None:
    rows = list(read_metrics(whole))
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(0 <= row["used_codes"] <= 10 and row["perplexity"] <= 10 for row in rows)
    made = load_tokenizer(whole)
    manifest = read_manifest(whole)
    assert (manifest["kind"], manifest["status"]) == ("tokenizer fit", "finished")
    assert manifest["tokenizer"] == made.fingerprint()
    assert manifest["data_fingerprint"] == made.facts["data_fingerprint"]
    assert made(torch.rand(2, 1, 16, 8)).shape == (2, 8)
    config = str(whole / "config.yaml")
    assert run(["tokenizer", "fit", "--config", config, "--out", str(tmp_path / "again")]) == 0
    assert load_tokenizer(tmp_path / "again").fingerprint() == made.fingerprint()
    assert run([*TINY, "--out", str(whole), "--resume"]) == 0


def test_codes_are_shown_decoded(whole: Path) -> None:
    view = look_at_tokens(load_tokenizer(whole), open_source("digits", DataOptions(limit=20)), examples=1)
    assert view.shows == "what it decodes to"
    assert len(view.pictures) == 10 and view.pictures[0].shape == (4, 4, 3)


def test_killed_and_resumed_is_bit_identical(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["clustermim.verbs.tokenizer_fit"])
    out = tmp_path / "broken"
    command = [*TINY, "--out", str(out), "--resume"]
    process = processes.Process(target=run, args=(command,))
    process.start()
    while process.is_alive():
        if any(row["step"] >= 7 for row in read_metrics(out)):
            process.kill()
        time.sleep(0.002)
    process.join()
    assert process.exitcode == -signal.SIGKILL and read_manifest(out)["status"] == "running"
    assert run(command) == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    untimed = [[(row["step"], row["loss"], row["perplexity"]) for row in read_metrics(x)] for x in (out, whole)]
    assert untimed[0] == untimed[1]


def test_stopped_at_the_time_limit(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TINY, "--out", str(tmp_path / "a"), "--max-minutes", "0"]) == 75
    assert "--resume to continue exactly" in said(capsys)
    assert run([*TINY, "--out", str(tmp_path / "a"), "--resume"]) == 0
    assert load_tokenizer(tmp_path / "a").fingerprint() == load_tokenizer(whole).fingerprint()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tokenizer", "fit", "--epochs", "3"], "--epochs: only for --kind vqvae, not for kmeans"),
        (["tokenizer", "fit", "--depth", "2"], "only for --kind vqvae"),  # the default, but typed
        (["tokenizer", "fit", "--kind", "oracle", "--estimator", "gumbel"], "--estimator: only for --kind vqvae"),
        ([*FIT, "--features", "pixel?context=12"], "--features: not for --kind vqvae"),
        ([*FIT, "--metric", "cosine", "--tol", "0.1"], "--metric, --tol: not for --kind vqvae"),
        ([*FIT, "--estimater", "gumbel"], "--estimator"),
        ([*FIT, "--estimator", "soft"], "gumbel"),
        ([*FIT, "--k", "1"], "at least 2"),
        ([*FIT, "--k", "99999"], "k = 99999 is more than there are patches"),
        ([*FIT, "--patch-size", "3"], "does not divide"),
        ([*FIT, "--epochs", "0"], "--epochs must be at least 1"),
        ([*FIT, "--checkpoint-every", "soon"], "30s, 10m, 2h"),
    ],
)
def test_bad_input(arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--out", str(tmp_path / "a")]) == 2
    message = said(capsys)
    assert told in message and "Traceback" not in message
    assert not (tmp_path / "a").exists()


def test_too_few_distinct_patches_leave_the_folder_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((40, 8, 8), np.uint8))
    arguments = [*FIT, "--data", str(tmp_path / "x.npz"), "--k", "20", "--patch-size", "4", "--epochs", "1"]
    assert run([*arguments, "--out", str(tmp_path / "a")]) == 2
    assert "distinct" in said(capsys)
    assert not (tmp_path / "a" / "config.yaml").exists()


def test_a_diverging_loss_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TINY, "--lr", "1e30", "--out", str(tmp_path / "a")]) == 3
    assert "Lower --lr" in said(capsys)


def test_a_stop_needs_a_folder() -> None:
    with pytest.raises(InputError, match="max_minutes needs out"):
        fit_tokenizer(k=5, kind="vqvae", vqvae=VQVAEConfig(max_minutes=1.0), options=DataOptions(limit=50))


@pytest.mark.slow
def test_two_processes_equal_one(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "clustermim"]
    subprocess.run([*command, *TINY, "--out", str(tmp_path / "two")], check=True)
    for key in ("loss", "perplexity"):
        values = [[row[key] for row in read_metrics(out)] for out in (whole, tmp_path / "two")]
        assert values[0] == pytest.approx(values[1], rel=2e-2)
