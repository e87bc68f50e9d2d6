"""`clustermim pretrain` watched: by loggers that show what metrics.jsonl holds, and change or end nothing."""

import sys
import time
import types

import pytest
import torch
import yaml

from clustermim.cli import run
from clustermim.errors import InputError
from clustermim.mim.watching import Sight, Watchers
from clustermim.runs import RunDirectory, read_manifest, read_metrics
from clustermim.training.launch import make_fabric
from clustermim.training.loggers import Loggers, check_loggers
from clustermim.training.progress import TrainingProgress
from clustermim.verbs.pretrain_watch import WatchOptions
from forking import start_ranks
from watch_samples import curve, tensorboard, wandb_records

TINY = "pretrain --data digits --limit 64 --target pixel --patch-size 4 --batch-size 16 --epochs 3 --device cpu"
TINY += " --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --log-every 1 --checkpoint-every 3 --out"
SHORT = TINY.replace("--checkpoint-every 3 ", "")
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


def forget_the_end(out):
    """As if killed right after the last step: without the last checkpoint, and not finished."""
    sorted((out / "checkpoints").iterdir())[-1].unlink()
    manifest = (out / "manifest.json").read_text()
    assert '"status": "finished"' in manifest
    (out / "manifest.json").write_text(manifest.replace('"status": "finished"', '"status": "running"'))


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
    forget_the_end(out)
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
    forget_the_end(out)
    kept = next((out / "checkpoints").iterdir()).name
    assert kept.startswith("step-00000009")
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


ALL = ["--picture-every", "2", "--probe-every", "2", "--checkpoint-every", "4", "--log", "tensorboard"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The run of 12 steps, 4 an epoch, with all watchers there are."""
    pytest.importorskip("tensorboard")
    out = tmp_path_factory.mktemp("watched") / "run"
    assert run([*SHORT.split(), str(out), *ALL]) == 0
    return out


def pictures(folder):
    return {file.name: file.read_bytes() for file in (folder / "pictures").iterdir()}


def test_all_of_it_broken_off_in_mid_epoch_and_killed_after_a_look(watched, tmp_path, works, fails):
    """Killed between steps 9 and 12: the look after step 8 is kept, that after step 12 is repeated."""
    command, out = [*SHORT.split(), tmp_path / "a", *ALL], tmp_path / "a"
    fails(*command, "--max-minutes", "0", code=75)
    works(*command, "--resume")
    forget_the_end(out)
    assert [file.name[:13] for file in (out / "checkpoints").iterdir()] == ["step-00000008"]
    works(*command, "--resume")
    assert rows(out) == rows(watched) and same(out, watched) and pictures(out) == pictures(watched)
    assert [row["step"] for row in rows(out) if "knn_cls" in row] == [8, 12]
    for name, steps in (("loss", range(1, 13)), ("knn_cls", (8, 12))):
        assert [step for step, _ in curve(out / "tensorboard", name)] == list(steps)
    assert [event.step for event in tensorboard(out / "tensorboard").Images("pictures")] == [8, 12]
    result = read_manifest(out)["result"]
    assert result == read_manifest(watched)["result"] | {name: result[name] for name in TIMES}


def test_in_two_processes_the_first_watches(plain, watched, tmp_path):
    assert start_ranks([*SHORT.split(), str(tmp_path / "a"), *ALL], 2) == [0, 0]
    assert [(row["step"], "loss" in row) for row in rows(tmp_path / "a")] == [
        (row["step"], "loss" in row) for row in rows(watched)
    ]
    assert [step for step, _ in curve(tmp_path / "a" / "tensorboard", "loss")] == list(range(1, 13))
    assert len(list((tmp_path / "a" / "tensorboard").iterdir())) == 1
    assert sorted(pictures(tmp_path / "a")) == sorted(pictures(watched))


def test_sharded_weights_are_seen_whole(watched, tmp_path):
    assert start_ranks([*SHORT.split(), str(tmp_path / "a"), *ALL, "--strategy", "fsdp"], 1) == [0]
    assert rows(tmp_path / "a") == rows(watched) and pictures(tmp_path / "a") == pictures(watched)


def test_a_look_moves_no_generator_and_its_time_is_told(tmp_path):
    class Dice:
        name = "dice"

        def __call__(self, moment):
            time.sleep(0.05)
            return Sight(told="six.", figures={"eyes": float(torch.rand(()))}, news=" · 6")

    fabric, model = make_fabric("cpu"), torch.nn.Linear(2, 2)
    with (
        RunDirectory(tmp_path / "a", "pretrain", {}) as held,
        Watchers(fabric, held, every={"dice": 3}, looks=[Dice()]) as watchers,
        TrainingProgress(40, "test") as progress,
    ):
        watchers.begin(progress, 0, 40, per_epoch=4, batch_size=8)
        before = torch.random.get_rng_state()
        taken = {step for step in range(1, 41) if watchers.look(step, model, None) > 0.04}
        assert torch.equal(torch.random.get_rng_state(), before)
        assert taken == {12, 24, 36, 40} and watchers.news == " · 6"
        assert [(row["step"], row["images"]) for row in held.metrics()] == [(12, 96), (24, 192), (36, 288), (40, 320)]


def test_a_fault_of_ours_is_not_hidden(tmp_path):
    class Faulty:
        name = "faulty"

        def __call__(self, moment):
            return {}["no such key"]

    with (
        RunDirectory(tmp_path / "a", "pretrain", {}) as held,
        Watchers(make_fabric("cpu"), held, every={"faulty": 1}, looks=[Faulty()]) as watchers,
        TrainingProgress(4, "test") as progress,
    ):
        watchers.begin(progress, 0, 4, per_epoch=4, batch_size=8)
        with pytest.raises(KeyError):
            watchers.look(4, torch.nn.Linear(2, 2), None)
