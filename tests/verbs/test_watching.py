"""`clustermim pretrain` watched: by loggers that show what metrics.jsonl holds, and change or end nothing."""

import sys
import types

import pytest
import yaml

from clustermim.cli import run
from clustermim.errors import InputError
from clustermim.runs import RunDirectory, read_manifest, read_metrics
from clustermim.training.loggers import Loggers, check_loggers
from clustermim.verbs.pretrain_watch import WatchOptions
from forking import start_ranks
from watch_samples import curve, wandb_records

TINY = "pretrain --data digits --limit 64 --target pixel --patch-size 4 --batch-size 16 --epochs 3 --device cpu"
TINY += " --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --log-every 1 --checkpoint-every 3 --out"
TIMES = ("seconds", "images_per_second", "mfu")


def rows(folder):
    """Rows of metrics without what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of 12 steps that nobody watches."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert run([*TINY.split(), str(out)]) == 0
    return out


def same(one, other):
    """Whether two runs ended with the same weights, byte for byte."""
    return all((one / f).read_bytes() == (other / f).read_bytes() for f in ("encoder.safetensors", "model.safetensors"))


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_tensorboard_shows_the_rows_of_metrics_once_whatever_happened(plain, tmp_path, works, fails):
    """Broken off after every step, and once killed with steps that no checkpoint holds."""
    pytest.importorskip("tensorboard")
    command, out = [*TINY.split(), tmp_path / "a", "--log", "tensorboard"], tmp_path / "a"
    fails(*command, "--max-minutes", "0", code=75)
    fails(*command, "--max-minutes", "0", "--resume", code=75)
    works(*command, "--resume")
    for newest in sorted((out / "checkpoints").iterdir())[1:]:  # as if killed after step 12, the last checkpoint at 9
        newest.unlink()
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(manifest.replace('"status": "finished"', '"status": "running"'))
    works(*command, "--resume")
    assert rows(out) == rows(plain) and same(out, plain)
    found = curve(out / "tensorboard", "loss")
    assert [step for step, _ in found] == list(range(1, 13))
    assert [value for _, value in found] == pytest.approx([row["loss"] for row in rows(out)], rel=1e-6)
    assert curve(out / "tensorboard", "lr")[-1][0] == 12
    assert yaml.safe_load((out / "config.yaml").read_text())["log"] == ["tensorboard"]


def test_wandb_goes_on_with_one_run_and_gets_each_step_once(offline, plain, tmp_path, works, fails):
    command, out = [*TINY.split(), tmp_path / "a", "--log", "wandb"], tmp_path / "a"
    works(*command)
    for newest in sorted((out / "checkpoints").iterdir())[1:]:
        newest.unlink()
    kept = next((out / "checkpoints").iterdir()).name
    assert kept.startswith("step-00000009")
    (out / "manifest.json").write_text(
        (out / "manifest.json").read_text().replace('"status": "finished"', '"status": "running"')
    )
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:11]))  # W&B has seen 12 steps, the file 11
    works(*command, "--resume")
    (first, before), (second, after) = wandb_records(out)
    assert first == second == read_manifest(out)["wandb_id"]
    assert [step for step, _ in before] == list(range(1, 13))
    assert [step for step, _ in after] == [12]  # 10 and 11 were sent already
    assert [figures["loss"] for _, figures in before] == [row["loss"] for row in rows(plain)]
    assert rows(out) == rows(plain) and same(out, plain)


def test_a_logger_may_be_added_or_left_out_on_resumption(plain, tmp_path, works, fails):
    pytest.importorskip("tensorboard")
    command = [*TINY.split(), tmp_path / "a"]
    fails(*command, "--max-minutes", "0", code=75)
    fails(*command, "--max-minutes", "0", "--resume", "--log", "tensorboard", code=75)
    works(*command, "--resume")
    assert [step for step, _ in curve(tmp_path / "a" / "tensorboard", "loss")] == [2]
    assert rows(tmp_path / "a") == rows(plain)


def test_a_folder_that_cannot_be_written_is_told_once_and_ends_nothing(plain, tmp_path, works, fails):
    pytest.importorskip("tensorboard")
    command, out = [*TINY.split(), tmp_path / "a", "--log", "tensorboard"], tmp_path / "a"
    fails(*command, "--max-minutes", "0", code=75)
    for file in (out / "tensorboard").iterdir():
        file.unlink()
    (out / "tensorboard").rmdir()
    (out / "tensorboard").write_text("in the way")
    said = works(*command, "--resume")
    assert said.count("--log tensorboard failed") == 1
    assert rows(out) == rows(plain) and same(out, plain)


def test_a_disk_that_fills_up_under_the_events_is_told_once_and_ends_nothing(plain, tmp_path, works, monkeypatch):
    """Every write to the event file fails from the third flush on, as on a full disk."""
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    flush, calls = RecordWriter.flush, []

    def full(self):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(RecordWriter, "flush", full)
    said = works(*TINY.split(), tmp_path / "a", "--log", "tensorboard")
    assert said.count("--log tensorboard failed ([Errno 28] No space left on device)") == 1
    assert rows(tmp_path / "a") == rows(plain) and same(tmp_path / "a", plain)


def test_a_network_that_is_gone_ends_nothing(plain, tmp_path, works, monkeypatch):
    """The package as it is where there is no network: raising when a run begins, or later."""
    for at in ("init", "log"):
        monkeypatch.setitem(sys.modules, "wandb", broken_wandb(at))
        monkeypatch.setattr("clustermim.training.loggers.find_spec", lambda name: types.SimpleNamespace(origin="here"))
        said = works(*TINY.split(), tmp_path / at, "--log", "wandb")
        assert said.count("--log wandb failed (the network is gone)") == 1
        assert rows(tmp_path / at) == rows(plain) and same(tmp_path / at, plain)


def broken_wandb(at):
    """The part of wandb's API that is used, failing at one place."""

    class Run:
        def log(self, data, step):
            if at == "log":
                raise ConnectionError("the network is gone")

        def finish(self, exit_code):
            if at == "finish":
                raise ConnectionError("the network is gone")

    def init(**options):
        if at == "init":
            raise ConnectionError("the network is gone")
        return Run()

    return types.SimpleNamespace(init=init, Image=object, Settings=lambda **options: None)


def test_an_end_without_network_is_told_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", broken_wandb("finish"))
    told = []
    loggers = Loggers(["wandb"], told.append)
    with RunDirectory(tmp_path / "a", "pretrain", {}) as held:
        loggers.open(held, 0)
        loggers.row({"step": 1, "loss": 1.0})
        assert told == []
        loggers.close()
        loggers.close()
    assert len(told) == 1 and "the network is gone" in told[0]


def test_missing_packages_are_told_before_work(tmp_path, fails, monkeypatch):
    monkeypatch.setattr("clustermim.training.loggers.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        said = fails(*TINY.split(), tmp_path / "a", "--log", name)
        assert f"pip install 'clustermim[{name}]'" in said
    assert not (tmp_path / "a").exists()


def test_a_folder_called_wandb_is_no_package(tmp_path, monkeypatch):
    """W&B leaves one behind where it runs, and Python takes any folder for a package without code."""
    (tmp_path / "tensorboard").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match="is not installed"):
        WatchOptions(log=("tensorboard",))


def test_spellings_of_log(tmp_path, fails):
    pytest.importorskip("tensorboard")
    assert "choose from" in fails(*TINY.split(), tmp_path / "a", "--log", "tensorbord").lower()
    with pytest.raises(InputError, match="Did you mean 'tensorboard'"):
        check_loggers(["tensorbord"])
    both = ["--log", "tensorboard", "--log", "tensorboard"]
    assert run([*TINY.split(), str(tmp_path / "a"), *both]) == 0
    assert len(list((tmp_path / "a" / "tensorboard").iterdir())) == 1
    assert run([*TINY.split(), str(tmp_path / "b"), *both, "--dry-run"]) == 0
    assert not (tmp_path / "b").exists()


def test_of_two_processes_the_first_logs(plain, tmp_path):
    pytest.importorskip("tensorboard")
    assert start_ranks([*TINY.split(), str(tmp_path / "a"), "--log", "tensorboard"], 2) == [0, 0]
    assert [step for step, _ in curve(tmp_path / "a" / "tensorboard", "loss")] == list(range(1, 13))
    assert len(list((tmp_path / "a" / "tensorboard").iterdir())) == 1
