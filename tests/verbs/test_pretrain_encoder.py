"""`clustermim pretrain` from the outside: what it leaves behind, what it survives, what it refuses."""

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from clustermim.cli import run
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.errors import InputError, NonFiniteLossError
from clustermim.mim.model import MaskedImageModel
from clustermim.runs import read_manifest, read_metrics
from clustermim.tokenizers.fitting import fit
from clustermim.verbs.pretrain_encoder import pretrain

TINY = {"model": "vit_micro", "patch_size": 4, "target": "pixel", "batch_size": 32, "device": "cpu"}
TINY |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
WHOLE = TINY | {"epochs": 6, "log_every": 1, "checkpoint_every": "5", "limit": 128}


def words(**options):
    """Options as typed on a command line."""
    found = []
    for key, value in options.items():
        found += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "k5"
    source = open_source("digits")
    fit(source, patch_size=4, k=5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of 24 steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    options = {key: value for key, value in WHOLE.items() if key != "limit"}
    return pretrain("digits", out=out, options=DataOptions(limit=128), **options)


def test_what_a_run_leaves_behind(whole):
    rows = list(read_metrics(whole.out))
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert whole.rows()[0]["loss"] == rows[-1]["loss"]
    manifest = read_manifest(whole.out)
    assert (manifest["kind"], manifest["status"], manifest["seed"]) == ("pretrain", "finished", 0)
    assert set(manifest["data"]) >= {"mean", "std", "channels", "image_size", "classes"}
    assert manifest["data_fingerprint"]
    assert manifest["model"] == whole.model
    everything = load_file(whole.out / "model.safetensors")
    encoder = load_file(whole.out / "encoder.safetensors")
    assert {"mask_token", "decoder_pred.weight"} <= set(everything)
    assert all(torch.equal(everything[key], value) for key, value in encoder.items())
    assert "Pretrained encoder" in str(whole.__rich__().title)


def test_timm_alone_opens_the_encoder(whole, tmp_path):
    images = torch.rand(3, 1, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    program = """
import json, sys, timm, torch
run, folder = sys.argv[1:]
manifest = json.load(open(run + "/manifest.json"))
model, data = manifest["model"], manifest["data"]
encoder = timm.create_model(
    model["name"], **model["kwargs"], num_classes=0, checkpoint_path=run + "/encoder.safetensors"
).eval()
images = torch.load(folder + "/images.pt")
mean, std = (torch.tensor(data[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
with torch.no_grad():
    torch.save(encoder.forward_features((images - mean) / std), folder + "/features.pt")
assert not any(name.split(".")[0] == "clustermim" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, str(whole.out), str(tmp_path)], check=True)

    import timm

    manifest = read_manifest(whole.out)
    model = MaskedImageModel(
        timm.create_model(manifest["model"]["name"], **manifest["model"]["kwargs"], num_classes=0), 16,
        decoder_dim=16, decoder_depth=1, decoder_heads=2, mean=manifest["data"]["mean"], std=manifest["data"]["std"],
    )  # fmt: skip
    model.load_mae_state(load_file(whole.out / "model.safetensors"))
    with torch.no_grad():
        ours = model.encode(images, torch.arange(4).expand(3, -1))
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), ours, atol=1e-5, rtol=0)


def test_killed_at_three_random_steps_and_resumed_is_bit_identical(whole, tmp_path, monkeypatch):
    # Real processes, killed for real; the fork server spares each of them the import of torch and timm.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["clustermim.verbs.pretrain_encoder"])
    out = tmp_path / "broken"
    command = ["pretrain", *words(data="digits", out=out, resume=True, **WHOLE)]
    for step in [*sorted(random.sample(range(2, 23), 3)), None]:
        process = processes.Process(target=run, args=(command,))
        process.start()
        while step is not None and process.is_alive():
            if step in [row["step"] for row in read_metrics(out)]:
                process.kill()
            time.sleep(0.01)
        process.join()
        assert process.exitcode == (0 if step is None else -signal.SIGKILL)
        assert read_manifest(out)["status"] == ("finished" if step is None else "running")
    for name in ("encoder.safetensors", "model.safetensors"):
        assert (out / name).read_bytes() == (whole.out / name).read_bytes()
    resumed, unbroken = ([(row["step"], row["loss"], row["lr"]) for row in read_metrics(x)] for x in (out, whole.out))
    assert resumed == unbroken
    assert run(command) == 0


@pytest.mark.slow
def test_two_processes_equal_one(whole, tmp_path):
    command = [sys.executable, "-m", "clustermim", "pretrain", "--devices", "2"]
    subprocess.run([*command, *words(data="digits", out=tmp_path / "two", **WHOLE)], check=True)
    losses = [[row["loss"] for row in read_metrics(out)] for out in (whole.out, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_config_repeats_the_run(whole, tmp_path):
    assert run(["pretrain", "--config", str(whole.out / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "encoder.safetensors").read_bytes() == (whole.out / "encoder.safetensors").read_bytes()
    first, second = (yaml.safe_load((out / "config.yaml").read_text()) for out in (whole.out, tmp_path / "again"))
    assert first == second


def test_tokens_from_the_command_line(tokenizer, tmp_path):
    options = {**TINY, "target": "token", "tokenizer": tokenizer, "epochs": 1, "limit": 128, "log_every": 1}
    options.pop("patch_size")
    assert run(["pretrain", *words(data="digits", out=tmp_path / "a", **options)]) == 0
    rows = list(read_metrics(tmp_path / "a"))
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    manifest = read_manifest(tmp_path / "a")
    assert manifest["model"]["kwargs"]["patch_size"] == 4
    assert manifest["tokenizer_fingerprint"]


def test_arrays_and_continuing_from_an_encoder(whole, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    options = TINY | {"epochs": 1, "batch_size": 40, "lr": 1e-12, "out": tmp_path / "a"}
    found = pretrain(images, init=whole.out, **options)
    before, after = (load_file(out / "encoder.safetensors") for out in (whole.out, found.out))
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    with pytest.raises(InputError, match="--init"):
        pretrain(images, init=whole.out, **options | {"out": tmp_path / "b", "patch_size": 2})
    assert not (tmp_path / "b").exists()


MORE = [
    {"target": "token", "soft_targets": 0.5, "token_weights": "inverse-sqrt", "ema": 0.9},
    {"target": "token", "encoder": "full", "mask_kind": "block", "mask_ratio": 0.5},
    {"target": "feature", "features": "hog+pixel?whiten=true", "decoder": "cross", "predict_ratio": 0.5},
]


@pytest.mark.parametrize("changes", MORE, ids=["token options", "BEiT", "features, cross"])
def test_other_ways_from_the_command_line(changes, tokenizer, tmp_path, capsys):
    sized = {} if "encoder" in changes else {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    given = {"data": "digits", "limit": 64, "batch_size": 32, "epochs": 2, "patch_size": 4, "device": "cpu"} | sized
    given |= changes | ({"tokenizer": tokenizer} if changes["target"] == "token" else {})
    assert run(["pretrain", *words(out=tmp_path / "a", **given)]) == 0, capsys.readouterr().err
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert all(config[key] == value for key, value in changes.items())
    assert np.isfinite(list(read_metrics(tmp_path / "a"))[-1]["loss"])
    encoder = load_file(tmp_path / "a" / "encoder.safetensors")
    everything = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(everything[key], value) for key, value in encoder.items())
    # What the run was told, fed back, repeats it.
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    assert run(["pretrain", "--config", str(tmp_path / "again.yaml"), "--out", str(tmp_path / "b")]) == 0
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(everything[key], again[key]) for key in everything)


def test_dry_run_writes_nothing(tmp_path, capsys):
    options = TINY | {"steps": 77, "limit": 128}
    assert run(["pretrain", *words(data="digits", out=tmp_path / "a", dry_run=True, **options)]) == 0
    said = capsys.readouterr().out
    assert "encoder parameters" in said
    assert "77" in said
    assert "memory" in said
    assert not (tmp_path / "a").exists()


def test_nan_is_exit_code_3(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise NonFiniteLossError("The loss of step 7 is nan.")

    monkeypatch.setattr("clustermim.verbs.pretrain_run.train", fail)
    assert run(["pretrain", *words(data="digits", out=tmp_path / "a", limit=128, **TINY)]) == 3
    assert "step 7" in capsys.readouterr().err


BAD = [
    ({"target": "pixels"}, "Did you mean 'pixel'"),
    ({"model": "vit_mirco"}, "Did you mean 'vit_micro'"),
    ({"patch_size": 3}, "does not divide"),
    ({"target": "token"}, "needs --tokenizer"),
    ({"target": "token", "tokenizer": "nowhere"}, "nowhere"),
    ({"batch_size": 1000, "limit": 100}, "--batch-size 100 or less"),
    ({"batch_size": 10, "accumulate": 3}, "multiple of 3"),
    ({"mask_ratio": 0.99}, "mask ratio"),
    ({"epochs": 0}, "--epochs"),
    ({"epochs": 2, "steps": 9}, "--epochs or --steps says how long to train, but both are given"),
    ({"checkpoint_every": "sometimes"}, "30s, 10m, 2h"),
    ({"init": "nowhere"}, "nowhere"),
    ({"label_smooting": 0.1}, "label-smoothing"),
    ({"data": "nowhere"}, "nowhere"),
    ({"channels": 3, "mean": 0.5}, "--mean"),
    ({"devices": 0}, "at least one"),
    ({"norm_pix": True, "patch_size": 1}, "variance"),
    ({"target": "feature"}, "needs --features"),
    ({"target": "feature", "features": "pixle"}, "Did you mean 'pixel'"),
    ({"features": "pixel"}, "--features is for --target feature"),
    ({"label_smoothing": 0.1}, "--label-smoothing is for --target token"),
    ({"predict_ratio": 0.5}, "needs --decoder cross"),
    ({"encoder": "full"}, "has no decoder"),
    ({"ema": 1.5}, "--ema"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(BAD)])
def test_bad_input_is_refused_before_anything_is_written(changes, message, tmp_path, capsys):
    options = {"data": "digits", **TINY, **changes}
    assert run(["pretrain", *words(out=tmp_path / "a", **options)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "a").exists()


def test_a_tokenizer_of_another_grid_or_channels_is_refused(tokenizer, tmp_path, capsys):
    base = {"data": "digits", "target": "token", "tokenizer": tokenizer, "device": "cpu", "out": tmp_path / "a"}
    for changes in ({"image_size": 16}, {"patch_size": 2}, {"channels": 3}):
        assert run(["pretrain", *words(**base, **changes)]) == 2
        assert "tokenizer is for images of 8 × 8" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a").exists()


def test_directories_in_use_are_refused(whole, tmp_path, capsys):
    same = words(data="digits", **WHOLE)
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.out.rglob("*"))
    assert run(["pretrain", *same, "--out", str(whole.out)]) == 2
    assert "finished" in capsys.readouterr().err
    assert run(["pretrain", *same, "--out", str(whole.out), "--resume", "--seed", "5"]) == 2
    assert "seed: 0 then, 5 now" in " ".join(capsys.readouterr().err.split())
    assert before == sorted((p, p.stat().st_mtime_ns) for p in whole.out.rglob("*"))
    (tmp_path / "mine.txt").write_text("precious")
    assert run(["pretrain", *same, "--out", str(tmp_path)]) == 2
    assert "mine.txt" in capsys.readouterr().err


def test_other_data_under_the_same_name_are_not_continued(tmp_path):
    file = tmp_path / "images.npz"
    rng = np.random.default_rng(0)
    options = TINY | {"epochs": 4, "batch_size": 16, "out": tmp_path / "a"}
    np.savez(file, x=rng.integers(0, 256, (32, 8, 8), dtype=np.uint8))
    with pytest.raises(Exception, match="max-minutes"):
        pretrain(file, max_minutes=0.0, **options)
    np.savez(file, x=rng.permuted(np.load(file)["x"], axis=0))
    view = json.loads((tmp_path / "a" / "manifest.json").read_text())["data"]
    statistics = DataOptions(mean=tuple(view["mean"]), std=tuple(view["std"]))
    with pytest.raises(InputError, match="contents have changed"):
        pretrain(file, resume=True, options=statistics, **options)
