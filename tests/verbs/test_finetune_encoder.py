"""`clustermim finetune`: exact resume, a classifier that timm loads, judged once, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from clustermim.cli import run
from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError, Stopped
from clustermim.evaluation.finetune import Bundle
from clustermim.verbs.finetune_encoder import finetune
from clustermim.verbs.pretrain_encoder import pretrain


def make_data(n: int = 60, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Grey 8 × 8 images whose brightness tells the class, nearly."""
    labels = np.arange(n) % classes
    noise = np.random.default_rng(0).random((n, 8, 8))
    return (255 * (0.4 * noise + 0.6 * labels[:, None, None] / classes)).astype(np.uint8), labels


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(make_data(), out=out, target="pixel", patch_size=4, epochs=1, batch_size=24, decoder_depth=1)
    return out


QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 16, "log_every": 1}


def test_a_stopped_run_goes_on_exactly(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finetune(pretrained, make_data(), out=tmp_path / "whole", **QUICK)
    # The first call is stopped after its second step, as a signal would.
    seen = iter([None, "by SIGTERM"])
    with monkeypatch.context() as patch:
        patch.setattr("clustermim.training.launch.StopRequest.reason", property(lambda self: next(seen, "by SIGTERM")))
        with pytest.raises(Stopped, match="Fine-tuning was stopped by SIGTERM after step 2 of 6"):
            finetune(pretrained, make_data(), out=tmp_path / "parts", **QUICK)
    parts = finetune(pretrained, make_data(), out=tmp_path / "parts", resume=True, **QUICK)
    assert parts.rows() == whole.rows() and {row["weights"] for row in whole.rows()} == {"last", "ema"}
    first, second = (load_file(tmp_path / name / "classifier.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    losses = [
        [row["loss"] for row in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    again = finetune(pretrained, make_data(), out=tmp_path / "whole", resume=True, **QUICK)
    assert again.rows() == whole.rows()


def test_timm_loads_the_classifier_and_probe_the_encoder(pretrained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rows = finetune(pretrained, make_data(), out=out, mixup=0, cutmix=0, ema=0, randaugment="none", **QUICK).rows()
    assert [row["weights"] for row in rows] == ["last"]
    assert rows[0]["top1_low"] <= rows[0]["top1"] <= rows[0]["top1_high"] and rows[0]["n_test"] == 12
    recipe = json.loads((out / "classifier.json").read_text())
    model = timm.create_model(recipe["name"], **recipe["kwargs"], checkpoint_path=str(out / "classifier.safetensors"))
    encoder = open_encoder(out)
    images = torch.rand(5, 1, 8, 8)
    head = load_file(out / "classifier.safetensors")
    with torch.no_grad():
        patches = encoder(images).patches
        assert patches is not None
        expected = patches.mean(1) @ head["head.weight"].T + head["head.bias"]
        torch.testing.assert_close(model.eval()(encoder.prepare(images)), expected, rtol=1e-4, atol=1e-6)


def test_it_learns(tmp_path: Path) -> None:
    rows = finetune(
        "random:vit_micro?patch_size=4",
        make_data(),
        out=tmp_path / "run",
        epochs=15,
        batch_size=16,
        lr=1e-2,
        randaugment="none",
        ema=0.9,
    ).rows()
    assert max(row["top1"] for row in rows) > 0.8


def test_other_encoders_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = make_data()
    np.savez(tmp_path / "some.npz", x=images, y=labels)
    words = f"finetune --encoder random:test_resnet --data {tmp_path}/some.npz --out {tmp_path}/run --epochs 1"
    more = f"--batch-size 16 --drop-path 0 --json {tmp_path}/rows.json"
    assert run([*words.split(), *more.split()]) == 0
    assert "95 % interval" in capsys.readouterr().out
    assert {row["weights"] for row in json.loads((tmp_path / "rows.json").read_text())} == {"last", "ema"}
    assert open_encoder(tmp_path / "run").name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"encoder": "raw-pixels"}, "nothing to fine-tune"),
        ({"batch_size": 4000}, "--batch-size 48 or less"),
        ({"randaugment": "rund-m9"}, "no policy"),
        ({"pool": "cls", "encoder": torch.nn.Sequential(torch.nn.Conv2d(1, 8, 4, 4))}, "has no 'cls'"),
        ({"encoder": torch.nn.Sequential(torch.nn.Conv2d(1, 8, 4, 4))}, "--layer-decay 1"),
        ({"encoder": torch.nn.Sequential(torch.nn.Conv2d(1, 8, 4, 4)), "layer_decay": 1.0}, "--drop-path 0"),
        ({"drop_path": 1.0}, "--drop-path"),
        ({"lr": 0.0}, "--lr"),
        ({"layer_decay": 0.0}, "--layer-decay"),
        ({"checkpoint_every": "soon"}, "--checkpoint-every"),
    ],
)
def test_bad_input_is_refused_before_any_training(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    asked = {"encoder": "random:vit_micro?patch_size=4", "out": tmp_path / "run", **QUICK} | changes
    with pytest.raises(InputError, match=expected):
        finetune(asked.pop("encoder"), make_data(), **asked)
    assert not (tmp_path / "run").exists()


def test_the_average_follows_the_weights() -> None:
    from clustermim.data.sources import open_source
    from clustermim.evaluation.classifier import Classifier

    view = open_source(make_data()).view
    classifier = Classifier(open_encoder("random:vit_micro?patch_size=4", view=view), 3)
    bundle = Bundle(classifier, 0.5)
    assert bundle.ema is not None and not any(p.requires_grad for p in bundle.ema.parameters())
    with torch.no_grad():
        classifier.head.bias += 1
    for step in range(1, 30):
        bundle.ema.update(classifier, step=step)
    torch.testing.assert_close(bundle.ema.module.head.bias, classifier.head.bias, atol=1e-3, rtol=0)
    assert Bundle(classifier, 0).ema is None
