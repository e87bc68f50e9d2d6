"""Checkpoints come in as runs that every verb takes, and a MAE checkpoint goes out again as it came."""

import argparse
import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from clustermim.encoders.opening import open_encoder
from clustermim.encoders.weights import read_weights
from clustermim.errors import InputError
from clustermim.mim.building import build_model
from clustermim.verbs.export_run import export_encoder
from clustermim.verbs.import_file import import_checkpoint
from clustermim.verbs.pretrain_encoder import pretrain
from clustermim.verbs.probe_encoders import probe
from door_samples import foreign_content, tiny_beit, tiny_mim, tiny_vit


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_random_mae_checkpoint_goes_in_and_out_unchanged(suffix: str, tmp_path: Path) -> None:
    model, _ = tiny_mim((32, 32))
    generator = torch.Generator().manual_seed(3)
    state = {key: torch.randn(value.shape, generator=generator) for key, value in model.mae_state().items()}
    torch.save({"model": state, "epoch": 7, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "mae.pth")
    imported = import_checkpoint(tmp_path / "mae.pth", format="mae", out=tmp_path / "run", heads=4)
    export_encoder(imported.out, format="mae", out=tmp_path / f"again{suffix}")
    again = read_weights(tmp_path / f"again{suffix}")
    assert set(again) == set(state)
    assert all(torch.equal(again[key], state[key]) for key in state)
    # and the model that the weights belong to computes what it did
    ours, _ = build_model(
        "vit_micro", image_size=32, patch_size=8, channels=3, output_dim=7, mean=[0.5] * 3, std=[0.5] * 3
    )
    ours.load_mae_state(again)
    assert imported.figures["decoder"] is True
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["decoder"] == {
        "dim": 64,
        "depth": 2,
        "heads": 4,
    }


def test_an_imported_run_is_an_encoder_for_every_verb(tmp_path: Path) -> None:
    vit = tiny_vit(in_chans=1, img_size=8, patch_size=2, depth=12)
    torch.save(foreign_content("dino", vit.state_dict()), tmp_path / "dino.pth")
    run = import_checkpoint(tmp_path / "dino.pth", format="timm", out=tmp_path / "run", mean=(0.3,), std=(0.4,)).out
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected = vit.forward_features((images - 0.3) / 0.4)  # type: ignore[operator]
        torch.testing.assert_close(open_encoder(run)(images).cls, expected[:, 0])
    table = probe([str(run)], "digits", protocol=["knn"])
    assert {row["pool"] for row in table.rows()} == {"cls", "mean"}
    manifest = json.loads((run / "manifest.json").read_text())
    model = timm.create_model(
        manifest["model"]["name"],
        **manifest["model"]["kwargs"],
        num_classes=0,
        checkpoint_path=str(run / "encoder.safetensors"),
    )
    assert all(torch.equal(value, vit.state_dict()[key]) for key, value in model.state_dict().items())
    assert manifest["kind"] == "import" and len(manifest["checkpoint_sha256"]) == 64
    # continued by a pretraining of the same size
    continued = pretrain(
        "digits",
        out=tmp_path / "more",
        target="pixel",
        patch_size=2,
        model="vit_tiny_patch16_224",
        init=run,
        dry_run=True,
    )
    assert continued.out is None


@pytest.mark.parametrize("size", [None, 48])
def test_beit_comes_in_as_timms_beit(size: int | None, tmp_path: Path) -> None:
    model = tiny_beit(use_rel_pos_bias=True, use_abs_pos_emb=False, global_pool="token")
    torch.save({"model": model.state_dict() | {"mask_token": torch.ones(1, 1, 32)}}, tmp_path / "beit.pth")
    result = import_checkpoint(tmp_path / "beit.pth", format="timm", out=tmp_path / "run", image_size=size)
    assert result.model["name"].startswith("beit_") and result.figures["left_out"] == ["mask_token"]
    encoder = open_encoder(result.out)
    assert encoder.image_size == ((size or 32),) * 2
    with pytest.raises(InputError, match="--format timm"):
        import_checkpoint(tmp_path / "beit.pth", format="mae", out=tmp_path / "other")


def test_any_timm_model_comes_in_by_its_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "cnn.safetensors")
    run = import_checkpoint(tmp_path / "cnn.safetensors", format="timm", model="test_resnet", out=tmp_path / "run").out
    encoder = open_encoder(run)
    assert encoder.image_size is not None
    images = torch.rand(1, 3, *encoder.image_size)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(encoder.prepare(images)), pre_logits=True)
        torch.testing.assert_close(encoder(images).pooled()["mean"], expected)
    export_encoder(run, format="timm", out=tmp_path / "folder")
    with pytest.raises(InputError, match="a ResNet, not a VisionTransformer"):
        export_encoder(run, format="transformers", out=tmp_path / "hf")
    with pytest.raises(InputError, match="no ViT with a class token"):
        export_encoder(run, format="mae", out=tmp_path / "mae.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cnn.safetensors", "folder", "run"]
