"""`pretrain` and `tokenizer fit` on streams: exact over resumption, workers and ranks; other verbs refuse them."""

import json
from itertools import pairwise

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from clustermim.cli import run
from clustermim.runs import read_manifest, read_metrics
from clustermim.tokenizers.tokenizer import load_tokenizer
from clustermim.verbs.tokenizer_fit import fit_tokenizer
from forking import start_ranks
from shard_samples import picture, write_parquet, write_shards

TINY = "--target pixel --patch-size 4 --batch-size 8 --device cpu --decoder-dim 16 --decoder-depth 1 --decoder-heads 2"
TINY += " --log-every 1 --checkpoint-every 3 --lanes 4 --shuffle-window 12 --out"
SIZES = (11, 3, 9, 12, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["tar", "parquet"])
def pattern(request, tmp_path_factory):
    write = write_shards if request.param == "tar" else write_parquet
    return write(tmp_path_factory.mktemp("stream") / "s", SIZES)


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


def test_stopped_in_the_middle_of_an_epoch_and_resumed_is_bit_identical(pattern, tmp_path, works, fails):
    command = ["pretrain", "--data", pattern, "--steps", "6", *TINY.split()]
    works(*command, tmp_path / "whole")
    for number in range(5):  # 5 steps an epoch, by turns without and with processes that read
        again = ["--max-minutes", "0", "--workers", number % 3] + (["--resume"] if number else [])
        assert f"after step {number + 1} of 6" in fails(*command, tmp_path / "parts", *again, code=75)
    works(*command, tmp_path / "parts", "--resume", "--workers", "2")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "parts")) == 6
    for name in ("encoder.safetensors", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    config = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert (config["data"], config["steps"], config["lanes"], config["shuffle_window"]) == (pattern, 6, 4, 12)
    assert "epochs" not in config
    assert read_manifest(tmp_path / "whole")["data"]["images"] == 43
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    works("pretrain", "--config", tmp_path / "again.yaml", "--out", tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")


def test_two_processes_train_as_one(tmp_path):
    command = ["pretrain", "--data", write_shards(tmp_path / "s", SIZES), "--epochs", "1", "--precision", "64-true"]
    command += TINY.split()
    assert run([*command, str(tmp_path / "one")]) == 0
    assert start_ranks([*command, str(tmp_path / "two"), "--workers", "1"], 2) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-8)


def test_another_shard_under_the_same_name_is_not_continued(tmp_path, fails):
    pattern = write_shards(tmp_path / "s", SIZES)
    command = ["pretrain", "--data", pattern, "--steps", "8", "--mean", "0.5", "--std", "0.3", *TINY.split()]
    fails(*command, tmp_path / "a", "--max-minutes", "0", code=75)
    write_shards(tmp_path / "s", (*SIZES[:-1], 9))
    assert "--data is not what" in fails(*command, tmp_path / "a", "--resume")
    others = ["2" if word == "4" and before == "--lanes" else word for before, word in pairwise(["", *command])]
    assert "lanes: 4 then, 2 now" in fails(*others, tmp_path / "a", "--resume")


def test_tokens_of_a_stream_are_those_of_the_same_images(pattern, tmp_path, works):
    works(
        "tokenizer", "fit", "--data", pattern, "--k", 6, "--patch-size", 4, "--device", "cpu", "--out", tmp_path / "t"
    )
    pictures = np.stack([picture(number) for number in range(43)])
    streamed, plain = load_tokenizer(tmp_path / "t"), fit_tokenizer(pictures, k=6, patch_size=4, device="cpu")
    assert (streamed.codebook.centroids == plain.codebook.centroids).all()
    assert streamed.facts["images"] == 43
    arm = ["--target", "token", "--tokenizer", tmp_path / "t", "--batch-size", 8, "--device", "cpu", "--steps", 2]
    works("pretrain", "--data", pattern, *arm, "--token-weights", "inverse-sqrt", "--out", tmp_path / "r")
    assert np.isfinite(losses(tmp_path / "r")).all()


def test_controls_of_a_stream(pattern, tmp_path, works, fails):
    fit = ["tokenizer", "fit", "--data", pattern, "--patch-size", 4, "--device", "cpu", "--k", 6]
    works(*fit, "--kind", "identity", "--out", tmp_path / "i")
    assert load_tokenizer(tmp_path / "i").vocab_size == 43 * 4
    for kind in ("vqvae", "oracle"):
        plain = fit if kind == "vqvae" else fit[:-2]
        assert "is read from the front" in fails(*plain, "--kind", kind, "--out", tmp_path / kind)
    assert "is read from the front" in fails(*fit, "--align-with", "labels", "--out", tmp_path / "a")
    # An oracle of other data asks the stream for labels.
    labelled = (np.stack([picture(number) for number in range(30)]), np.arange(30) % 3)
    fit_tokenizer(labelled, kind="oracle", patch_size=4, device="cpu", out=tmp_path / "oracle")
    arm = ["--target", "token", "--tokenizer", tmp_path / "oracle", "--batch-size", 8, "--device", "cpu"]
    works("pretrain", "--data", pattern, *arm, "--steps", 2, "--out", tmp_path / "r")
    bare = write_shards(tmp_path / "s", (20,), labelled=False)
    assert "brings no labels" in fails("pretrain", "--data", bare, *arm, "--out", tmp_path / "n")


def test_verbs_that_take_images_in_any_order_refuse_streams_before_work(pattern, tmp_path, fails):
    fit_tokenizer("digits", kind="position", patch_size=4, device="cpu", out=tmp_path / "t")
    recipe = tmp_path / "study.yaml"
    for words in (
        ["probe", "--encoder", "raw-pixels", "--data", pattern],
        ["tcas", "--tokenizer", tmp_path / "t", "--data", pattern],
        ["tokenize", "--tokenizer", tmp_path / "t", "--data", pattern, "--out", tmp_path / "o"],
        ["tokenizer", "show", "--tokenizer", tmp_path / "t", "--data", pattern, "--out", tmp_path / "o"],
        ["finetune", "--encoder", "random:vit_micro", "--data", pattern, "--out", tmp_path / "o"],
        ["embed", "--encoder", "raw-pixels", "--data", pattern, "--out", tmp_path / "o.npz"],
        ["graph", "--data", pattern],
    ):
        assert "is read from the front" in fails(*words), words[0]
    recipe.write_text(json.dumps({"data": {"a": pattern}, "targets": {"pixels": {}}}))
    assert "is read from the front" in fails("study", recipe, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_options_of_streams_without_one(tmp_path, fails):
    command = ["pretrain", "--data", "digits", *TINY.split(), tmp_path / "a"]
    assert "--lanes and --shuffle-window are for streams" in fails(*command)
    assert not (tmp_path / "a").exists()


def test_encoders_of_a_run_on_a_stream_are_encoders(pattern, tmp_path, works):
    works("pretrain", "--data", pattern, "--steps", "2", *TINY.split(), tmp_path / "r")
    assert load_file(tmp_path / "r" / "encoder.safetensors")
    assert "digits" in works(
        *("probe", "--encoder", tmp_path / "r", "--data", "digits", "--protocol", "knn", "--device", "cpu")
    )
