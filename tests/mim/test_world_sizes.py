"""Two machines of one process each train as one does, stop together, and share their weights out where asked to."""

import pytest
import torch
from safetensors.torch import load_file

from clustermim.cli import run
from clustermim.runs import read_manifest, read_metrics
from forking import start_ranks

TINY = "pretrain --data digits --limit 64 --target pixel --patch-size 4 --batch-size 16 --epochs 2 --device cpu"
TINY += " --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --log-every 1 --checkpoint-every 3 --clip-grad 1 --out"


def losses(run_directory):
    return [row["loss"] for row in read_metrics(run_directory)]


def test_two_machines_equal_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--precision", "64-true"]
    assert run([*TINY.split(), str(one), *more]) == 0
    assert start_ranks([*TINY.split(), str(two), *more], 2) == [0, 0]
    assert losses(two) == pytest.approx(losses(one), abs=1e-8)
    assert len(losses(one)) == 8


@pytest.mark.slow
def test_two_machines_stop_together_and_go_on(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start_ranks([*TINY.split(), str(whole)], 2) == [0, 0]
    assert start_ranks([*TINY.split(), str(parts), "--max-minutes", "0"], 2) == [75, 75]
    assert start_ranks([*TINY.split(), str(parts), "--resume"], 2) == [0, 0]
    assert (whole / "encoder.safetensors").read_bytes() == (parts / "encoder.safetensors").read_bytes()
    assert losses(whole) == losses(parts)


def test_sharded_by_one_process_is_the_same_training(tmp_path):
    """Its checkpoint is loaded without it, and the other way round."""
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    assert run([*TINY.split(), str(plain)]) == 0
    sharded = [*TINY.split(), str(mixed), "--strategy", "fsdp"]
    assert start_ranks([*sharded, "--max-minutes", "0"], 1) == [75]
    assert run([*TINY.split(), str(mixed), "--resume", "--max-minutes", "0"]) == 75
    assert start_ranks([*sharded, "--resume"], 1) == [0]
    assert losses(plain) == losses(mixed)
    assert (plain / "encoder.safetensors").read_bytes() == (mixed / "encoder.safetensors").read_bytes()
    assert read_manifest(mixed)["status"] == "finished"


@pytest.mark.slow
def test_sharded_by_two_processes(tmp_path):
    plain, sharded, parts = (tmp_path / name for name in ("plain", "sharded", "parts"))
    assert run([*TINY.split(), str(plain)]) == 0
    assert start_ranks([*TINY.split(), str(sharded), "--strategy", "fsdp"], 2) == [0, 0]
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-5)
    for more, code in ((["--max-minutes", "0"], 75), (["--resume"], 0)):
        assert start_ranks([*TINY.split(), str(parts), "--strategy", "fsdp", *more], 2) == [code, code]
    assert losses(parts) == losses(sharded)
    one, other = (load_file(out / "encoder.safetensors") for out in (sharded, parts))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    "more", [["--ema", "0.9"], ["--compile"], ["--precision", "64-true"]], ids=lambda more: more[0]
)
def test_what_sharding_cannot_do_is_refused(more, tmp_path, fails):
    assert "--strategy" in fails(*TINY.split(), tmp_path / "a", "--strategy", "fsdp", *more)
    assert not (tmp_path / "a").exists()
