"""The loop: exact under accumulation, stopping and resuming; honest about NaN."""

import contextlib
import os
import signal

import numpy as np
import pytest
import timm
import torch

from clustermim.data.loaders import make_loader
from clustermim.data.sources import open_source
from clustermim.errors import InputError, NonFiniteLossError, Stopped
from clustermim.mim.building import initialise
from clustermim.mim.estimate import estimate
from clustermim.mim.lean_blocks import LeanBlock
from clustermim.mim.model import MaskedImageModel
from clustermim.mim.pretraining import PretrainConfig, train
from clustermim.mim.targets import PixelTarget, TargetLoss
from clustermim.products import multiplies_bfloat16
from clustermim.runs import RunDirectory
from clustermim.training.checkpoints import Checkpoints, Interval
from clustermim.training.launch import listen_for_stop, make_fabric

IMAGES = np.random.default_rng(0).integers(0, 256, (44, 6, 4, 2), dtype=np.uint8)


def tiny_model(mean, std):
    """Far smaller than any preset, because these tests write a checkpoint at every other step."""
    sizes = {"img_size": (6, 4), "patch_size": 2, "in_chans": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
    encoder = timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=0)
    model = MaskedImageModel(encoder, 8, decoder_dim=16, decoder_depth=1, decoder_heads=2, mean=mean, std=std)
    initialise(model, 0)
    return model


class Troublesome(PixelTarget):
    """Does something at one call: the loss becomes NaN, or the process is told to stop."""

    def __init__(self, at, trouble):
        view = open_source(IMAGES).view
        super().__init__(2, view.mean, view.std, norm_pix=False)
        self.calls, self.at, self.trouble = 0, at, trouble

    def forward(self, predictions, images, mask, *, index=None, labels=None, keys=None):
        found = super().forward(predictions, images, mask)
        self.calls += 1
        if self.calls == self.at and self.trouble == "nan":
            return TargetLoss(found.loss * float("nan"), {})
        if self.calls == self.at and self.trouble == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return found


def go(
    folder, *, resume=False, max_minutes=None, target=None, precision="32-true", warn=lambda message: None, **changes
):
    config = PretrainConfig(
        **{"epochs": 3, "batch_size": 8, "base_lr": 0.05, "log_every": 2, "checkpoint_every": Interval(steps=4)}
        | changes
    )
    fabric = make_fabric("cpu", 1, precision)
    source = open_source(IMAGES)
    view = source.view
    model = tiny_model(view.mean, view.std)
    target = target or PixelTarget(2, view.mean, view.std, norm_pix=False)
    loader = make_loader(source, batch_size=config.part_size(1), train=True, seed=config.seed)
    with RunDirectory(folder, "pretrain", {}, resume=resume) as run, listen_for_stop(max_minutes) as stop:
        row = train(fabric, model, target, loader, config, run, Checkpoints(folder / "checkpoints", warn=warn), stop)
        rows = list(run.metrics())
    return model, row, rows


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "mfu")} for row in rows]


def assert_same_weights(one, two):
    for (key, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_it_learns_and_says_so(tmp_path):
    _, row, rows = go(tmp_path / "a")
    assert [r["step"] for r in rows] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert rows[-1] == row
    assert rows[-1]["images"] == 120
    assert rows[-1]["epoch"] == 3
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(set(r) >= {"step", "epoch", "images", "loss", "lr", "seconds", "images_per_second", "mfu"} for r in rows)
    assert len(list((tmp_path / "a" / "checkpoints").iterdir())) == 2


def test_stopped_after_every_step_and_resumed_is_bit_identical(tmp_path):
    options = {"batch_size": 16, "clip_grad": 1.0, "accumulate": 2, "log_every": 4}
    whole, _, rows = go(tmp_path / "whole", **options)
    for step in range(1, 6):
        with pytest.raises(Stopped, match=f"step {step} of 6") as stopped:
            go(tmp_path / "parts", **options, resume=step > 1, max_minutes=0.0)
        assert stopped.value.exit_code == 75
    parts, _, resumed = go(tmp_path / "parts", **options, resume=True)
    assert_same_weights(whole, parts)
    assert timeless(rows) == timeless(resumed)
    again, _, unchanged = go(tmp_path / "parts", **options, resume=True)
    assert_same_weights(whole, again)
    assert timeless(unchanged) == timeless(rows)


@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"mask_kind": "block", "mask_ratio": 0.5}, {"predict_ratio": 0.5}])
def test_stopped_and_resumed_is_bit_identical_with(changes, tmp_path):
    """The masks are functions of the step, and the running mean is part of the checkpoint."""
    whole, _, rows = go(tmp_path / "whole", **changes)
    for step in range(1, 4):
        with pytest.raises(Stopped):
            go(tmp_path / "parts", **changes, resume=step > 1, max_minutes=0.0)
    parts, _, resumed = go(tmp_path / "parts", **changes, resume=True)
    assert_same_weights(whole, parts)
    assert timeless(rows) == timeless(resumed)
    plain, _, _ = go(tmp_path / "plain")
    assert not torch.equal(plain.encoder.norm.weight, whole.encoder.norm.weight)


def test_the_running_mean_by_hand(tmp_path):
    """A decay that warms up as 1 − step^(−2/3), never above the one asked for; the decoder is not averaged."""
    plain, _, _ = go(tmp_path / "plain")
    averaged, _, _ = go(tmp_path / "ema", ema=0.5)
    assert torch.equal(averaged.decoder_pred.weight, plain.decoder_pred.weight)
    trajectory = encoder_after_each_step(tmp_path / "trajectory")
    mean = trajectory[0]
    for step, value in enumerate(trajectory[1:]):
        decay = 0.0 if step <= 1 else min(0.5, 1 - step ** (-2 / 3))
        mean = decay * mean + (1 - decay) * value
    torch.testing.assert_close(averaged.encoder.norm.weight, mean, atol=1e-6, rtol=1e-5)


def encoder_after_each_step(folder):
    """The encoder's norm at the start and after every step of the plain run, read from its checkpoints."""
    found = [tiny_model(open_source(IMAGES).view.mean, open_source(IMAGES).view.std).encoder.norm.weight.detach()]
    for step in range(15):
        with pytest.raises(Stopped) if step < 14 else contextlib.nullcontext():
            go(folder, resume=step > 0, max_minutes=0.0)
        found.append(Checkpoints(folder / "checkpoints").load_latest()[1]["model"]["encoder.norm.weight"])
    return found


def test_so_many_steps_are_the_first_of_a_longer_schedule_and_may_end_within_an_epoch(tmp_path):
    """15 steps are three epochs; 13 end within the third, and go on exactly after a stop at any place."""
    epochs, _, rows = go(tmp_path / "epochs")
    steps, _, others = go(tmp_path / "steps", epochs=None, steps=15)
    assert_same_weights(epochs, steps)
    assert timeless(rows) == timeless(others)
    whole, row, _ = go(tmp_path / "whole", epochs=None, steps=13)
    assert (row["step"], row["epoch"]) == (13, 13 / 5)
    for step in range(1, 13):
        with pytest.raises(Stopped, match=f"step {step} of 13"):
            go(tmp_path / "parts", epochs=None, steps=13, resume=step > 1, max_minutes=0.0)
    parts, _, _ = go(tmp_path / "parts", epochs=None, steps=13, resume=True)
    assert_same_weights(whole, parts)


def test_rows_after_the_checkpoint_are_written_again(tmp_path):
    whole, _, rows = go(tmp_path / "whole", log_every=1, checkpoint_every=Interval(steps=5))
    with pytest.raises(NonFiniteLossError):
        go(tmp_path / "torn", log_every=1, checkpoint_every=Interval(steps=5), target=Troublesome(9, "nan"))
    torn = [line for line in (tmp_path / "torn" / "metrics.jsonl").read_text().splitlines() if line]
    assert len(torn) == 8
    parts, _, resumed = go(tmp_path / "torn", log_every=1, checkpoint_every=Interval(steps=5), resume=True)
    assert_same_weights(whole, parts)
    assert timeless(rows) == timeless(resumed)


def test_a_damaged_checkpoint_costs_an_interval_not_the_run(tmp_path):
    whole, _, _ = go(tmp_path / "a")
    newest = max((tmp_path / "a" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])
    heard = []
    parts, _, _ = go(tmp_path / "a", resume=True, warn=heard.append)
    assert_same_weights(whole, parts)
    assert len(heard) == 1


def test_accumulated_parts_equal_the_large_batch(tmp_path):
    large, _, rows = go(tmp_path / "a", epochs=1)
    small, _, others = go(tmp_path / "b", epochs=1, accumulate=4)
    for (key, a), b in zip(large.named_parameters(), small.parameters(), strict=True):
        if key.endswith("qkv.bias"):  # softmax ignores the bias of keys: its gradient is rounding, which Adam scales up
            a, b = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (a, b))
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-3)
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in others], rel=1e-4)


@pytest.mark.parametrize("log_every", [1, 50])
def test_nan_names_its_step_and_keeps_the_good_checkpoint(tmp_path, log_every):
    with pytest.raises(NonFiniteLossError, match=r"step 7 .*checkpoint is kept") as error:
        go(tmp_path / "a", target=Troublesome(7, "nan"), log_every=log_every)
    assert error.value.exit_code == 3
    step, state = Checkpoints(tmp_path / "a" / "checkpoints").load_latest()
    assert step == 4
    assert all(value.isfinite().all() for value in state["model"].values())


def test_an_overflowing_gradient_is_found_before_it_is_saved(tmp_path):
    with pytest.raises(NonFiniteLossError):
        go(tmp_path / "a", base_lr=1e38, checkpoint_every=Interval(steps=1), log_every=50)
    found = Checkpoints(tmp_path / "a" / "checkpoints").load_latest()
    assert found is None or all(value.isfinite().all() for value in found[1]["model"].values())


def test_sigterm_stops_with_a_checkpoint(tmp_path):
    with pytest.raises(Stopped, match=r"by SIGTERM after step 6 .*--resume"):
        go(tmp_path / "a", target=Troublesome(6, "signal"))
    assert Checkpoints(tmp_path / "a" / "checkpoints").load_latest()[0] == 6


@pytest.mark.skipif(not multiplies_bfloat16(), reason="the processor has no fast products in bfloat16")
def test_bf16_is_near_and_keeps_32_bit_weights(tmp_path):
    _, _, exact = go(tmp_path / "a", epochs=2, base_lr=1e-3)
    model, _, rough = go(tmp_path / "b", epochs=2, base_lr=1e-3, precision="bf16-mixed")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert [r["loss"] for r in rough] == pytest.approx([r["loss"] for r in exact], rel=0.02)
    assert isinstance(model.encoder.blocks[0], LeanBlock)


def test_estimate_runs():
    fabric, source = make_fabric("cpu"), open_source(IMAGES)
    model = tiny_model([0.5] * 2, [0.3] * 2)
    config = PretrainConfig(epochs=7, batch_size=40, base_lr=1e-3, accumulate=2)
    loader = make_loader(source, batch_size=20, train=True)
    found = estimate(fabric, model, PixelTarget(2, [0.5] * 2, [0.3] * 2), loader, config)
    assert found["steps"] == 7
    assert found["encoder_parameters"] + found["decoder_parameters"] == sum(p.numel() for p in model.parameters())
    assert found["seconds"] > 0
    assert found["memory_bytes"] > 0
    assert found["flops_per_image"] > 3 * 2 * found["encoder_parameters"]  # each weight meets several tokens
    assert 0 < found["mfu"] < 2


def test_bad_numbers():
    for changes in (
        {"epochs": 0},
        {"epochs": None, "steps": 0},
        {"epochs": None},
        {"steps": 5},
        {"accumulate": 0},
        {"warmup": 1.0},
        {"base_lr": 0.0},
        {"clip_grad": -1.0},
        {"predict_ratio": 0.0},
        {"ema": 1.0},
    ):
        with pytest.raises(InputError):
            PretrainConfig(**{"epochs": 1, "batch_size": 8, "base_lr": 0.1} | changes)
    with pytest.raises(InputError, match="multiple of 6"):
        PretrainConfig(epochs=1, batch_size=8, base_lr=0.1, accumulate=3).part_size(2)
