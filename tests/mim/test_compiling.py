"""`--compile`: the same training, faster to the step and slow to begin."""

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from clustermim.cli import run
from clustermim.products import multiplies_bfloat16
from clustermim.runs import read_metrics

TINY = (
    "pretrain --data digits --limit 64 --patch-size 4 --batch-size 16 --device cpu --log-every 1 --checkpoint-every 3"
)
TINY += " --out"
DECODER = ["--decoder-dim", "16", "--decoder-depth", "2", "--decoder-heads", "2"]
TARGETS = {
    "pixel": ["--target", "pixel", *DECODER],
    "cross": ["--target", "pixel", "--decoder", "cross", "--predict-ratio", "0.5", *DECODER],
    "full": ["--target", "pixel", "--encoder", "full", "--mask-kind", "block", "--mask-ratio", "0.5"],
}


def losses(out):
    return [row["loss"] for row in read_metrics(out)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_the_same_losses_compiled(kind, tmp_path):
    counters.clear()
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        assert not counters["stats"]["unique_graphs"]
        assert run([*TINY.split(), str(tmp_path / name), "--epochs", "2", *TARGETS[kind], *more]) == 0
    assert counters["stats"]["unique_graphs"]
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
    assert len(losses(compiled)) == 8
    one, two = (load_file(out / "encoder.safetensors") for out in (eager, compiled))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], atol=2e-3, rtol=0, msg=key)


@pytest.mark.slow
@pytest.mark.skipif(not multiplies_bfloat16(), reason="the processor has no fast products in bfloat16")
def test_compiled_in_bf16_and_continued_exactly(tmp_path):
    options = ["--epochs", "3", *TARGETS["pixel"], "--precision", "bf16-mixed"]
    whole, parts, eager = (tmp_path / name for name in ("whole", "parts", "eager"))
    assert run([*TINY.split(), str(whole), *options, "--compile"]) == 0
    assert run([*TINY.split(), str(parts), *options, "--compile", "--max-minutes", "0"]) == 75
    assert run([*TINY.split(), str(parts), *options, "--compile", "--resume"]) == 0
    assert losses(parts) == losses(whole)
    assert (whole / "encoder.safetensors").read_bytes() == (parts / "encoder.safetensors").read_bytes()
    assert run([*TINY.split(), str(eager), *options]) == 0
    assert losses(whole) == pytest.approx(losses(eager), rel=0.02)
