"""`tokenizer fit` that is stopped: the exit code, the advice, and that --resume goes on exactly."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import clustermim.tokenizers.sampling as sampling
from clustermim.cli import run
from clustermim.features.pixel import PixelFeatures
from clustermim.tokenizers.tokenizer import load_tokenizer


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A fit whose rows do not fit the sample, so that it makes full passes over the images."""
    monkeypatch.setattr(sampling, "_LEAST", 100)
    monkeypatch.setattr(sampling, "_A_CLUSTER", 20)
    x = np.random.default_rng(0).integers(0, 256, (120, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x)
    options = ["--k", "6", "--patch-size", "2", "--tol", "0", "--max-passes", "6", "--batch-size", "30"]
    return ["tokenizer", "fit", "--data", str(tmp_path / "x.npz"), *options, "--out"]


def send_in_batch(monkeypatch: pytest.MonkeyPatch, number: int, what: signal.Signals) -> None:
    describe, seen = PixelFeatures.describe, [0]

    def describing(self: PixelFeatures, images: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), what)
        return describe(self, images)

    monkeypatch.setattr(PixelFeatures, "describe", describing)


@pytest.mark.parametrize(
    ("what", "code", "says"), [(signal.SIGTERM, 75, "in full pass 3"), (signal.SIGINT, 130, "Interrupted")]
)
def test_a_stopped_fit_goes_on_exactly(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: signal.Signals,
    code: int,
    says: str,
) -> None:
    assert run([*command, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        send_in_batch(patched, 4 + 2 * 4 + 2, what)  # the sampling pass, two full ones, and half of the third
        assert run([*command, str(tmp_path / "t")]) == code
    told = " ".join(capsys.readouterr().err.split())
    assert says in told and "--resume" in told
    assert run([*command, str(tmp_path / "t")]) == 2  # not over what is there
    assert run([*command, str(tmp_path / "t"), "--resume"]) == 0
    whole, again = load_tokenizer(tmp_path / "whole"), load_tokenizer(tmp_path / "t")
    assert again.fingerprint() == whole.fingerprint()
    assert (again.facts["inertia"], again.facts["full_passes"]) == (whole.facts["inertia"], whole.facts["full_passes"])
    assert not (tmp_path / "t" / "checkpoints").exists() and not (tmp_path / "t" / "lock").exists()
    assert run([*command, str(tmp_path / "t"), "--resume"]) == 0


def test_resuming_on_other_images_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        send_in_batch(patched, 6, signal.SIGTERM)
        assert run([*command, str(tmp_path / "t")]) == 75
    np.savez(tmp_path / "x.npz", x=np.zeros((120, 8, 8), dtype=np.uint8))
    assert run([*command, str(tmp_path / "t"), "--resume"]) == 2
    assert "contents have changed" in " ".join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / "t" / "manifest.json").read_text())["status"] == "running"


def test_images_without_variance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", x=np.full((20, 8, 8), 7, dtype=np.uint8))
    assert run(["tokenizer", "fit", "--data", str(tmp_path / "x.npz"), "--k", "4", "--out", str(tmp_path / "t")]) == 2
    assert "no variance" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "t").exists()
