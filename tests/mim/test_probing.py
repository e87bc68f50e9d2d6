"""A k-NN probe during pretraining: it is evaluation's k-NN of the weights at that step, and changes nothing."""

import numpy as np
import pytest
import torch

from clustermim.cli import run
from clustermim.data.loaders import make_loader
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError
from clustermim.evaluation.cache import extract
from clustermim.evaluation.knn import fit_knn
from clustermim.evaluation.protocols import validation_rows
from clustermim.mim.probing import PROBE, KNNProbe, open_probe
from clustermim.runs import read_manifest, read_metrics
from clustermim.verbs.pretrain_encoder import pretrain
from clustermim.verbs.pretrain_watch import WatchOptions
from forking import start_ranks
from shard_samples import write_shards

TINY = "pretrain --data digits --limit 64 --target pixel --patch-size 4 --batch-size 16 --epochs 3 --device cpu"
TINY += " --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --log-every 1 --checkpoint-every 3 --out"
WATCHED = [*TINY.split()[:-1], "--probe-every", "2", "--out"]
TIMES = ("seconds", "images_per_second", "mfu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(folder, *, probed=False):
    """Rows of the training, or of the probe, without what depends on the clock."""
    found = [row for row in read_metrics(folder) if ("knn_cls" in row) == probed]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def weights(folder):
    return [(folder / name).read_bytes() for name in ("encoder.safetensors", "model.safetensors")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    assert run([*TINY.split(), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    out = tmp_path_factory.mktemp("watched") / "run"
    assert run([*WATCHED, str(out)]) == 0
    return out


def test_it_changes_nothing_of_the_training(plain, watched):
    assert rows(watched) == rows(plain)
    assert weights(watched) == weights(plain)


def test_processes_that_read_its_images_change_nothing_either(tmp_path, works):
    works(*WATCHED, tmp_path / "a", "--workers", "1")
    works(*TINY.split(), tmp_path / "b", "--workers", "1")
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(rows(tmp_path / "a", probed=True)) == 2


def test_rows_stand_at_the_ends_of_epochs_and_in_the_result(watched):
    found = rows(watched, probed=True)
    assert [(row["step"], row["epoch"], row["images"]) for row in found] == [(8, 2.0, 128), (12, 3.0, 192)]
    assert all(0 <= row[f"knn_{pool}"] <= 1 and row[f"knn_{pool}_k"] >= 1 for row in found for pool in ("cls", "mean"))
    result = read_manifest(watched)["result"]
    assert result["knn_cls"] == found[-1]["knn_cls"] and "loss" in result


def test_the_last_figure_is_that_of_evaluation_for_the_encoder_of_the_run(watched):
    """The same k-NN on the saved encoder, by the evaluation's own way to features."""
    source = open_source("digits", DataOptions(limit=64))
    encoder = open_encoder(watched)
    vectors = extract(encoder, make_loader(source, batch_size=7, train=False))
    labels = torch.as_tensor(source.labels)
    validation = validation_rows(labels, None, 0)
    for (_, pool), features in vectors.items():
        chosen = fit_knn(features, labels, int(labels.max()) + 1, validation).chosen
        last = rows(watched, probed=True)[-1]
        assert (last[f"knn_{pool}"], last[f"knn_{pool}_k"]) == (chosen["val_top1"], chosen["k"])


def test_a_running_mean_is_what_is_probed(tmp_path):
    """Its figure is that of the encoder that the run leaves behind, which is the running mean."""
    out = tmp_path / "a"
    assert run([*WATCHED, str(out), "--ema", "0.999", "--lr", "0.5"]) == 0
    source = open_source("digits", DataOptions(limit=64))
    probe = KNNProbe(open_encoder(out).model, open_probe(source, None, DataOptions()), source.view, torch.device("cpu"))
    assert probe.judge() == {k: v for k, v in rows(out, probed=True)[-1].items() if k.startswith("knn")}


def test_images_are_training_images_and_stratified():
    options = DataOptions()
    source = open_source("digits", options)
    part = open_probe(source, None, options, 100)
    assert len(part) == 100 and set(np.bincount(part.labels)) == {10}
    test = open_source("digits", options, split="test")
    assert not set(part.rows.tolist()) & set(test.rows.tolist())
    other = open_probe(open_source(np.zeros((8, 8, 8), np.uint8)), "digits", options, 10_000)
    assert other.rows.tolist() == source.rows.tolist()


def test_images_of_another_source_and_of_another_size(tmp_path, works):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.integers(0, 256, (64, 12, 10, 3), dtype=np.uint8))
    np.savez(tmp_path / "y.npz", x=rng.integers(0, 256, (40, 9, 9), dtype=np.uint8), y=np.arange(40) % 4)
    command = [word for word in TINY.split()[:-1] if word not in ("--data", "digits")]
    command += ["--data", tmp_path / "x.npz", "--image-size", "8"]
    said = works(*command, "--probe-every", "3", "--probe-data", tmp_path / "y.npz", "--out", tmp_path / "a")
    assert "Epoch 3: k-NN names" in said
    assert len(rows(tmp_path / "a", probed=True)) == 1


@pytest.mark.slow
def test_weights_sharded_by_two_processes(plain, tmp_path):
    assert start_ranks([*WATCHED, str(tmp_path / "a"), "--strategy", "fsdp"], 2) == [0, 0]
    assert start_ranks([*TINY.split(), str(tmp_path / "b"), "--strategy", "fsdp"], 2) == [0, 0]
    assert len(rows(tmp_path / "a", probed=True)) == 2
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_stream_gives_images_from_the_fronts_of_its_shards(tmp_path, works, fails):
    pattern = write_shards(tmp_path / "s", (11, 3, 9, 12, 8))
    command = ["--target", "pixel", "--patch-size", "4", "--batch-size", "8", "--device", "cpu", "--epochs", "2"]
    command += ["--log-every", "1", "--decoder-dim", "16", "--decoder-depth", "1", "--decoder-heads", "2"]
    stream = ["pretrain", "--data", pattern, *command]
    works(*stream, "--out", tmp_path / "plain")
    works(*stream, "--out", tmp_path / "a", "--probe-every", "1", "--probe-images", "20")
    assert rows(tmp_path / "a") == rows(tmp_path / "plain") and weights(tmp_path / "a") == weights(tmp_path / "plain")
    assert [row["step"] for row in rows(tmp_path / "a", probed=True)] == [5, 10]
    bare = write_shards(tmp_path / "bare", (20,), labelled=False)
    said = fails("pretrain", "--data", bare, *command, "--out", tmp_path / "b", "--probe-every", "1")
    assert "brings no labels" in said and "--probe-data SRC" in said
    works("pretrain", "--data", bare, *command, "--out", tmp_path / "b", "--probe-every", "1", "--probe-data", pattern)
    assert len(rows(tmp_path / "b", probed=True)) == 2


BAD = [
    (["--probe-every", "0"], "at least 1"),
    (["--probe-every", "1", "--probe-images", "3"], "at least 10"),
    (["--probe-data", "digits"], "needs --probe-every"),
    (["--probe-images", "100"], "needs --probe-every"),
    (["--probe-every", "1", "--probe-data", "digits#test"], "test labels stay sealed"),
    (["--probe-every", "1", "--probe-data", "digit"], "'digits'"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_is_refused_before_anything_is_written(more, message, tmp_path, fails):
    assert message in fails(*TINY.split(), tmp_path / "a", *more)
    assert not (tmp_path / "a").exists()


def test_unlabelled_images_and_test_images_are_refused(tmp_path):
    options = {"target": "pixel", "patch_size": 4, "device": "cpu", "out": tmp_path / "a", "batch_size": 8}
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8), dtype=np.uint8)
    with pytest.raises(InputError, match="--probe-data SRC"):
        pretrain(images, watch=WatchOptions(probe_every=1), **options)
    with pytest.raises(InputError, match="single class"):
        pretrain((images, np.zeros(32, dtype=np.int64)), watch=WatchOptions(probe_every=1), **options)
    for split in ("test", "all"):
        with pytest.raises(InputError, match="sealed"):
            pretrain(f"digits#{split}", watch=WatchOptions(probe_every=1), **options)
    assert not (tmp_path / "a").exists()


def test_a_probe_that_fails_is_told_once_and_ends_nothing(plain, tmp_path, works, monkeypatch):
    def broken(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(KNNProbe, "judge", broken)
    said = works(*TINY.split(), tmp_path / "a", "--probe-every", "1")
    assert said.count(f"Warning: the {PROBE} failed ([Errno 5] Input/output error)") == 1
    assert rows(tmp_path / "a") == rows(plain) and rows(tmp_path / "a", probed=True) == []


def test_dry_run_checks_and_writes_nothing(tmp_path, works, fails):
    works(*WATCHED, tmp_path / "a", "--dry-run")
    assert "needs --probe-every" in fails(*TINY.split(), tmp_path / "a", "--dry-run", "--probe-data", "digits")
    assert not (tmp_path / "a").exists()
