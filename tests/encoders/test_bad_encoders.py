"""What cannot be opened, and the words it gets; and weights from files that can."""

import argparse
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from encoder_samples import HEIGHT, WIDTH, make_view, tiny_vit, write_run

from clustermim.data.views import ViewConfig
from clustermim.encoders.opening import open_encoder
from clustermim.encoders.weights import read_weights
from clustermim.errors import InputError

VIEW = ViewConfig(image_size=(32, 32), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


class Danger:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/clustermim-was-here",)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("timm:test_vitt", "Did you mean 'test_vit'"),
        ("random:vit_mico", "Did you mean 'vit_micro'"),
        ("tim:test_vit", "Did you mean 'timm:'"),
        ("raw-pixel", "Did you mean 'raw-pixels'"),
        ("no/such/run", "no run directory at 'no/such/run'"),
        ("raw-pixels:x", "takes nothing"),
        ("random:", "needs a name"),
        ("random:vit_micro?sed=1", "Did you mean 'seed'"),
        ("random:vit_micro?seed=one", "whole number"),
        ("random:vit_micro?patch_size=5", "does not divide"),
        ("timm:test_vit@no_such_file.pth", "no such file"),
        ("timm:test_vit?size=1x2x3", "size is a side"),
        ("timm:test_vit.no_such_tag", "no_such_tag"),
    ],
)
def test_a_wrong_spec_is_explained(spec: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_encoder(spec, view=VIEW)


def test_the_measure_of_the_images_is_needed() -> None:
    for spec in ("raw-pixels", "random:vit_micro", "timm:test_vit?size=source"):
        with pytest.raises(InputError, match="pass `view`"):
            open_encoder(spec)


def test_wrong_images_are_explained() -> None:
    encoder = open_encoder(tiny_vit(3))
    with pytest.raises(InputError, match="24 × 32 pixels, not 32 × 32"):
        encoder(torch.rand(1, 3, 32, 32))
    with pytest.raises(InputError, match=r"3 channel.*images have 5"):
        encoder(torch.rand(1, 5, HEIGHT, WIDTH))
    with pytest.raises(InputError, match="layers 0 to 2"):
        encoder.layers(torch.rand(1, 3, HEIGHT, WIDTH), [3])


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Danger()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="refused"):
        open_encoder(f"timm:test_vit@{tmp_path / 'evil.pth'}", view=VIEW)
    assert not Path("/tmp/clustermim-was-here").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "short.safetensors").write_bytes(b"\x10")
    torch.save({"model": {"a": torch.zeros(1000)}}, tmp_path / "cut.pth")
    cut = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(cut[: len(cut) // 2])
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name in ("text.pth", "short.safetensors", "cut.pth", "list.pth"):
        with pytest.raises(InputError, match=name):
            read_weights(tmp_path / name)


def test_a_namespace_beside_the_weights_is_no_code(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(2)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "mae.pth")
    assert set(read_weights(tmp_path / "mae.pth")) == {"a"}


def test_another_architecture_names_the_key_and_both_shapes(tmp_path: Path) -> None:
    torch.save({"model": tiny_vit(3).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"cls_token is \(1, 1, 32\), the model's is \(1, 1, 64\)"):
        open_encoder(f"timm:test_vit@{tmp_path / 'other.pth'}", view=VIEW)
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "cnn.safetensors")
    with pytest.raises(InputError, match=r"cls_token \(1, 1, 64\) is not in it \(it holds .*instead\)"):
        open_encoder(f"timm:test_vit@{tmp_path / 'cnn.safetensors'}", view=VIEW)


def test_a_run_must_fit_its_manifest(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    open_encoder(run)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["model"]["kwargs"]["embed_dim"] = 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"cls_token is \(1, 1, 32\), the model's is \(1, 1, 64\)"):
        open_encoder(run)
    (run / "encoder.safetensors").unlink()
    with pytest.raises(InputError, match=r"no encoder\.safetensors.*--resume"):
        open_encoder(run)
    (run / "manifest.json").write_text(json.dumps({"kind": "tokenizer fit"}))
    with pytest.raises(InputError, match="bag-of-tokens"):
        open_encoder(run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"manifest\.json"):
        open_encoder(tmp_path / "empty")


def test_weights_from_a_file_other_sizes_channels_and_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    file = tmp_path / "vit.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, file)
    images = torch.rand(2, 3, *model.patch_embed.img_size)
    encoder = open_encoder(f"timm:test_vit@{file}")
    with torch.no_grad():
        expected = model.forward_features(encoder.prepare(images))
        torch.testing.assert_close(encoder(images).cls, expected[:, 0])
        renamed = {f"layer{i}": v for i, v in enumerate(model.state_dict().values())}
        torch.save(renamed, tmp_path / "renamed.pth")
        remapped = open_encoder(f"timm:test_vit@{tmp_path / 'renamed.pth'}?remap=true")
        torch.testing.assert_close(remapped(images).cls, expected[:, 0])
        small = open_encoder(f"timm:test_vit@{file}?size=64x96", view=make_view(5))
        assert (small.image_size, small.channels) == ((64, 96), 5)
        patches = small(torch.rand(2, 5, 64, 96)).patches
        assert patches is not None and patches.shape[1] == (64 // 16) * (96 // 16)
    safetensors.torch.save_file(renamed, tmp_path / "renamed.safetensors")
    with pytest.raises(InputError, match="keeps no order"):
        open_encoder(f"timm:test_vit@{tmp_path / 'renamed.safetensors'}?remap=true")
    with pytest.raises(InputError, match="remap=true"):
        open_encoder(f"timm:test_vit@{tmp_path / 'renamed.pth'}")


def test_mae_layout_weights_open_as_their_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    state = model.state_dict() | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 64)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    encoder = open_encoder(f"timm:test_vit@{tmp_path / 'mae.pth'}")
    images = torch.rand(1, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).cls, model.forward_features(encoder.prepare(images))[:, 0])
