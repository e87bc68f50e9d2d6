"""Bad input of export and import through the command line: exit code 2, a message, and nothing written."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clustermim.cli import run
from door_samples import tiny_vit, write_tiny_run

Invoke = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run a command line that must end with 2; gives back its message as one line."""

    def invoke(*arguments: object) -> str:
        capsys.readouterr()
        found = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert found == 2, captured.err
        assert "Traceback" not in captured.err + captured.out and captured.out == ""
        return " ".join(captured.err.replace("│", " ").split())

    return invoke


class Danger:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/clustermim-import-was-here",)


def test_a_pickle_with_code_is_refused_and_never_run(fails: Invoke, tmp_path: Path) -> None:
    torch.save({"model": {"patch_embed.proj.weight": Danger()}}, tmp_path / "evil.pth")
    for arguments in (("--format", "mae"), ("--format", "timm"), ("--format", "timm", "--model", "test_vit")):
        message = fails("import", "--checkpoint", tmp_path / "evil.pth", *arguments, "--out", tmp_path / "run")
        assert "refused" in message
    assert "refused" in fails("probe", "--encoder", f"mae:{tmp_path / 'evil.pth'}", "--data", "digits")
    assert not Path("/tmp/clustermim-import-was-here").exists() and not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_architecture(fails: Invoke, tmp_path: Path) -> None:
    state = tiny_vit().state_dict()
    torch.save(state | {"blocks.1.mlp.fc2.weight": torch.zeros(192, 700)}, tmp_path / "odd.pth")
    message = fails("import", "--checkpoint", tmp_path / "odd.pth", "--format", "timm", "--out", tmp_path / "run")
    assert "blocks.1.mlp.fc2.weight is (192, 700), the model's is (192, 768)" in message
    arguments = ("--format", "timm", "--model", "test_vit", "--out", tmp_path / "run")
    message = fails("import", "--checkpoint", tmp_path / "odd.pth", *arguments)
    assert "cls_token is (1, 1, 192), the model's is (1, 1, 64)" in message
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "cnn.pth")
    message = fails("import", "--checkpoint", tmp_path / "cnn.pth", "--format", "mae", "--out", tmp_path / "run")
    assert "conv1.weight (64, 3, 7, 7)" in message and "patch_embed.proj.weight (width, channels, P, P)" in message
    assert not (tmp_path / "run").exists()


def test_options_that_do_not_fit(fails: Invoke, tmp_path: Path) -> None:
    torch.save(tiny_vit().state_dict(), tmp_path / "vit.pth")
    start = ("import", "--checkpoint", tmp_path / "vit.pth", "--out", tmp_path / "run", "--format")
    assert 'Did you mean "mae"?' in fails(*start, "mea")
    assert "does not divide 30" in fails(*start, "timm", "--image-size", 30)
    assert "height and width" in fails(*start, "timm", "--image-size", 8, 8, 8)
    assert "goes with --format timm" in fails(*start, "mae", "--model", "test_vit")
    assert "holds no decoder" in fails(*start, "mae", "--decoder-heads", 4)
    assert "Did you mean 'test_vit'" in fails(*start, "timm", "--model", "test_vitt")
    assert "does not fit" in fails(*start, "timm", "--mean", 0.5, 0.5, "--std", 0.5)
    missing = ("import", "--checkpoint", tmp_path / "no.pth", "--format", "mae", "--out", tmp_path / "run")
    assert "no such file" in fails(*missing)
    assert not (tmp_path / "run").exists()


def test_exports_that_cannot_be(fails: Invoke, tmp_path: Path) -> None:
    source = write_tiny_run(tmp_path / "run")
    start = ("export", "--run", source, "--format")
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    assert "exists already" in fails(*start, "mae", "--out", tmp_path / "thesis.tex")
    assert "exists already" in fails(*start, "timm", "--out", tmp_path / "full")
    assert "must end in .onnx" in fails(*start, "onnx", "--out", tmp_path / "encoder")
    assert "must end in .pth" in fails(*start, "mae", "--out", tmp_path / "mae.bin")
    assert 'Did you mean "onnx"?' in fails(*start, "onxn", "--out", tmp_path / "x.onnx")
    assert "manifest.json" in fails("export", "--run", tmp_path, "--format", "timm", "--out", tmp_path / "t")
    assert "no such folder" in fails("export", "--run", tmp_path / "no", "--format", "timm", "--out", tmp_path / "t")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run", "thesis.tex"]
