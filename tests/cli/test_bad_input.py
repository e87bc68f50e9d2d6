"""Every bad input that a user is likely to make, through the command line: exit code, message, and nothing lost."""

import io
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clustermim.cli import run
from invoking import Invoke


def write_images(folder: Path, count: int, *, classes: int = 0, size: int = 8) -> Path:
    """`count` noise images in one folder, or dealt to `classes` class folders."""
    generator = np.random.default_rng(0)
    for i in range(count):
        home = folder / f"class{i % classes}" if classes else folder
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (size, size), dtype=np.uint8)).save(home / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 8x8 grey images, patch side 2."""
    out = tmp_path_factory.mktemp("tokenizer") / "t"
    assert run(["tokenizer", "fit", "--data", "digits", "--k", "8", "--patch-size", "2", "--out", str(out)]) == 0
    return out


def test_unknown_verb_names_the_nearest(fails: Invoke) -> None:
    assert "Did you mean 'pretrain'?" in fails("pretrian")
    assert "Did you mean 'fit'?" in fails("tokenizer", "fitt")


def test_unknown_option_names_the_nearest(fails: Invoke, tmp_path: Path) -> None:
    assert "Did you mean --image-size?" in fails("pretrain", "--image-sise", 8, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_unknown_key_of_a_file_names_the_nearest(fails: Invoke, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 1\nbatch_sise: 8\n")
    message = fails("pretrain", "--config", recipe, "--out", tmp_path / "r")
    assert "batch_sise" in message and "Did you mean 'batch-size'?" in message


def test_unknown_choice_names_the_nearest(fails: Invoke, tmp_path: Path) -> None:
    assert "Did you mean 'token'?" in fails("pretrain", "--target", "tokn", "--out", tmp_path / "r")


@pytest.mark.parametrize("verb", ["tokenizer fit", "pretrain"])
def test_a_path_that_is_not_there(fails: Invoke, tmp_path: Path, verb: str) -> None:
    write_images(tmp_path / "photos", 4)
    target = ("--target", "pixel") if verb == "pretrain" else ()
    message = fails(*verb.split(), *target, "--data", tmp_path / "photo", "--out", tmp_path / "out")
    assert str(tmp_path / "photo").replace(" ", "") in message.replace(" ", "")
    assert "photos" in message
    assert not (tmp_path / "out").exists()


def test_an_unknown_source_name_names_the_nearest(fails: Invoke, tmp_path: Path) -> None:
    assert "'digits'" in fails("tokenizer", "fit", "--data", "digit", "--out", tmp_path / "out")


def test_an_empty_folder(fails: Invoke, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty" in fails("tokenizer", "fit", "--data", tmp_path / "empty", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_names_the_nearest(fails: Invoke, tmp_path: Path) -> None:
    message = fails("pretrain", "--target", "pixel", "--model", "vit_mikro", "--patch-size", 2, "--out", tmp_path / "r")
    assert "vit_micro" in message
    assert "vit_micro" in fails("probe", "--encoder", "random:vit_mikro", "--data", "digits", "--protocol", "knn")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("verb", ["tokenizer fit", "pretrain"])
def test_a_patch_side_that_does_not_divide(fails: Invoke, tmp_path: Path, verb: str) -> None:
    target = ("--target", "pixel") if verb == "pretrain" else ()
    message = fails(*verb.split(), *target, "--data", "digits", "--patch-size", 3, "--out", tmp_path / "out")
    assert "3" in message and "1, 2, 4" in message  # the sides that do
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("k", [1, 0, -3])
def test_fewer_than_two_tokens(fails: Invoke, tmp_path: Path, k: int) -> None:
    message = fails("tokenizer", "fit", "--data", "digits", "--k", k, "--patch-size", 2, "--out", tmp_path / "out")
    assert str(k) in message and "2" in message
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_distinct_patches(fails: Invoke, tmp_path: Path) -> None:
    same = np.zeros((40, 8, 8), dtype=np.uint8)
    same[20:, :4] = 255
    np.savez(tmp_path / "same.npz", x=same)
    message = fails(
        "tokenizer", "fit", "--data", tmp_path / "same.npz", "--k", 5, "--patch-size", 4, "--out", tmp_path / "out"
    )
    assert "distinct patches: 2 among" in message
    assert not (tmp_path / "out").exists()


def test_tcas_without_labels(fails: Invoke, tmp_path: Path, tokenizer: Path) -> None:
    data = write_images(tmp_path / "flat", 12)
    assert "label" in fails("tcas", "--tokenizer", tokenizer, "--data", data)


def test_tcas_and_probe_with_a_single_class(fails: Invoke, tmp_path: Path, tokenizer: Path) -> None:
    data = write_images(tmp_path / "one", 12, classes=1)
    assert "class" in fails("tcas", "--tokenizer", tokenizer, "--data", data)
    assert "class" in fails("probe", "--encoder", "raw-pixels", "--data", data, "--protocol", "knn")


def spoil(folder: Path, count: int) -> None:
    """Truncate the first `count` images of a folder, and add a text that calls itself a picture."""
    for file in sorted(folder.rglob("*.png"))[:count]:
        file.write_bytes(file.read_bytes()[:60])
    (folder / "zz_fake.png").write_text("not a picture")


def test_bad_images_among_good_are_counted_named_and_skipped(works: Invoke, tmp_path: Path) -> None:
    data = write_images(tmp_path / "flat", 40)
    spoil(data, 2)
    told = works("tokenizer", "fit", "--data", data, "--k", 4, "--patch-size", 2, "--out", tmp_path / "out")
    assert "3 " in told and "000.png" in told and "zz_fake.png" in told


def test_bad_images_are_an_error_when_asked_or_when_many(fails: Invoke, tmp_path: Path) -> None:
    data = write_images(tmp_path / "flat", 40)
    spoil(data, 2)
    arguments = ("tokenizer", "fit", "--data", data, "--k", 4, "--patch-size", 2, "--out", tmp_path / "out")
    assert "000.png" in fails(*arguments, "--on-bad-image", "error")
    spoil(data, 8)
    assert "10 %" in fails(*arguments)
    assert not (tmp_path / "out").exists()


PRETRAIN = ("pretrain", "--target", "pixel", "--data", "digits", "--patch-size", "2", "--epochs", "1")


def test_a_foreign_directory(fails: Invoke, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for arguments in (PRETRAIN, ("tokenizer", "fit", "--k", "4", "--patch-size", "2")):
        assert "thesis.tex" in fails(*arguments, "--out", tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_finished_run(fails: Invoke, works: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "run"
    works(*PRETRAIN, "--out", out)
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert "finished" in fails(*PRETRAIN, "--out", out)
    works(*PRETRAIN, "--out", out, "--resume")
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


def test_a_run_in_use(fails: Invoke, tmp_path: Path) -> None:
    from clustermim.lease import _process_start

    out = tmp_path / "run"
    out.mkdir()
    holder = {"host": socket.gethostname(), "pid": os.getppid(), "start": _process_start(os.getppid())}
    (out / "lock").write_text(json.dumps(holder))
    assert f"in use by process {os.getppid()}" in fails(*PRETRAIN, "--out", out)
    assert [entry.name for entry in out.iterdir()] == ["lock"]


def test_a_fitted_tokenizer_is_not_overwritten(fails: Invoke, tokenizer: Path) -> None:
    before = {file.name: file.read_bytes() for file in tokenizer.iterdir()}
    fails("tokenizer", "fit", "--data", "digits", "--k", 4, "--patch-size", 2, "--out", tokenizer)
    assert {file.name: file.read_bytes() for file in tokenizer.iterdir()} == before


def test_a_tokenizer_of_another_patch_side(fails: Invoke, tmp_path: Path, tokenizer: Path) -> None:
    message = fails(
        "pretrain", "--data", "digits", "--tokenizer", tokenizer, "--patch-size", 4, "--out", tmp_path / "run"
    )
    assert "2" in message and "4" in message and "patch" in message
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_other_channels(fails: Invoke, tmp_path: Path, tokenizer: Path) -> None:
    message = fails(
        "pretrain", "--data", "digits", "--channels", 3, "--tokenizer", tokenizer, "--out", tmp_path / "run"
    )
    assert "channel" in message and "1" in message and "3" in message
    assert not (tmp_path / "run").exists()


def test_a_token_target_without_a_tokenizer(fails: Invoke, tmp_path: Path) -> None:
    assert "--tokenizer" in fails("pretrain", "--target", "token", "--data", "digits", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--probes", 2), "two levels only"),
        (("--levels", 2, "--probes", 9), "has 5 cells"),
        (("--levels", 2, "--n-init", 3, "--max-passes", 5), "--n-init, --max-passes: K-means on two levels"),
        (("--levels", 2, "--tol", 0.1), "--tol: K-means on two levels"),
        (("--levels", 2, "--kind", "random"), "one level"),
        (("--levels", 3), "levels"),
    ],
)
def test_levels_and_probes_that_do_not_fit(fails: Invoke, tmp_path: Path, more: tuple[object, ...], told: str) -> None:
    out = tmp_path / "out"
    assert told in fails("tokenizer", "fit", "--data", "digits", "--k", 24, "--patch-size", 4, "--out", out, *more)
    assert not out.exists()


def test_probes_of_a_tokenizer_without_cells(fails: Invoke, tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "ids.npz"
    message = fails("tokenize", "--tokenizer", tokenizer, "--data", "digits", "--out", out, "--probes", 2)
    assert "no cells" in message and not out.exists()


def test_what_is_no_tokenizer(fails: Invoke, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    fails("tcas", "--tokenizer", tmp_path, "--data", "digits")
    fails("tcas", "--tokenizer", tmp_path / "absent", "--data", "digits")


def test_what_is_no_run(fails: Invoke, tmp_path: Path) -> None:
    assert "manifest" in fails("probe", "--encoder", tmp_path, "--data", "digits", "--protocol", "knn")


def test_float_images_of_unknown_range(fails: Invoke, tmp_path: Path) -> None:
    np.savez(tmp_path / "raw.npz", x=np.linspace(0, 4000, 10 * 64, dtype=np.float32).reshape(10, 8, 8))
    message = fails("tokenizer", "fit", "--data", tmp_path / "raw.npz", "--out", tmp_path / "out")
    assert "--value-range" in message and "4000" in message


def test_a_loss_that_is_not_finite(fails: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "run"
    message = fails(*PRETRAIN[:-1], "3", "--lr", "1e30", "--warmup", "0", "--out", out, code=3)
    assert "step" in message
    assert json.loads((out / "manifest.json").read_text())["status"] != "finished"


def test_an_interrupt_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import clustermim.verbs.pretrain_encoder as verb

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "open_images", interrupted)
    assert run(["pretrain", "--target", "pixel", "--patch-size", "2", "--out", "unused"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_results_go_to_stdout_alone(works: Invoke, capsys: pytest.CaptureFixture[str], tokenizer: Path) -> None:
    out = io.StringIO()
    assert run(["tcas", "--tokenizer", str(tokenizer), "--data", "digits"]) == 0
    out.write(capsys.readouterr().out)
    assert "alignment" in out.getvalue().lower()
