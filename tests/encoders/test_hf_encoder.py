"""Hugging Face models behind the contract give exactly what transformers itself gives."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from encoder_samples import make_view
from hf_samples import EXTRA, make_hf, write_hf, write_preprocessor

from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", EXTRA)
def test_features_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    write_hf(tmp_path, name)
    write_preprocessor(tmp_path, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    encoder = open_encoder(f"hf:{tmp_path}")
    theirs = make_hf(name)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    pixels = (IMAGES - mean) / std
    options = {}
    if name == "ViTMAEForPreTraining":
        theirs.config.mask_ratio, theirs = 0.0, theirs.vit
        options["noise"] = torch.arange(16.0).expand(2, -1)
    head = None
    if name == "BeitForMaskedImageModeling":
        theirs, head = theirs.beit, theirs.layernorm
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, output_hidden_states=True, **options)
        first, last = encoder.layers(IMAGES, [0, -1])
        norm = head or theirs.layernorm
        tokens = expected.last_hidden_state if head is None else head(expected.last_hidden_state)
        inner = norm(expected.hidden_states[1])
    registers = 4 if "Registers" in name else 0
    assert last.cls is not None and last.patches is not None and first.patches is not None
    torch.testing.assert_close(last.patches, tokens[:, 1 + registers :], rtol=0, atol=1e-5)
    torch.testing.assert_close(first.patches, inner[:, 1 + registers :], rtol=0, atol=1e-5)
    if name == "BeitModel":
        torch.testing.assert_close(last.cls, expected.pooler_output, rtol=0, atol=1e-5)
        assert first.cls is None
    else:
        torch.testing.assert_close(last.cls, tokens[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(first.cls, inner[:, 0], rtol=0, atol=1e-5)


def test_positions_are_interpolated_as_transformers_does(tmp_path: Path) -> None:
    write_hf(tmp_path, "ViTModel")
    encoder = open_encoder(f"hf:{tmp_path}?size=48x64", view=make_view(3))
    images = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        expected = make_hf("ViTModel")(pixel_values=(images - 0.4) / 0.3, interpolate_pos_encoding=True)
        patches = encoder(images).patches
    torch.testing.assert_close(patches, expected.last_hidden_state[:, 1:], rtol=0, atol=1e-5)


def test_the_preprocessor_says_how_images_are_normalised_and_how_large_they_are(tmp_path: Path) -> None:
    write_hf(tmp_path, "Dinov2Model")
    write_preprocessor(
        tmp_path,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
        size={"shortest_edge": 60},
        crop_size=48,
        do_center_crop=True,
    )
    encoder = open_encoder(f"hf:{tmp_path}")
    assert encoder.image_size == (48, 48)
    assert encoder._mean.flatten().tolist() == [0.5] * 3 and encoder._std.flatten().tolist() == [0.25] * 3
    # mean and std that are taken off pixels from 0 to 255
    write_preprocessor(tmp_path, image_mean=[127.5] * 3, image_std=[51.0] * 3, do_rescale=False)
    encoder = open_encoder(f"hf:{tmp_path}")
    assert encoder.image_size == (32, 32)
    torch.testing.assert_close(encoder._mean.flatten(), torch.full((3,), 0.5))
    torch.testing.assert_close(encoder._std.flatten(), torch.full((3,), 0.2))
    write_preprocessor(tmp_path, do_normalize=False)
    assert open_encoder(f"hf:{tmp_path}")._std.flatten().tolist() == [1.0] * 3


def test_what_cannot_be_opened_is_explained(tmp_path: Path) -> None:
    view = make_view(3)
    with pytest.raises(InputError, match=r"no-such-folder cannot be had"):
        open_encoder(f"hf:{tmp_path / 'no-such-folder'}", view=view)
    write_hf(tmp_path / "vit", "ViTModel")
    with pytest.raises(InputError, match=r"preprocessor_config\.json.*pass `view`"):
        open_encoder(f"hf:{tmp_path / 'vit'}")
    with pytest.raises(InputError, match=r"do not tile 30 × 30.*size=24"):
        open_encoder(f"hf:{tmp_path / 'vit'}?size=30", view=view)
    with pytest.raises(InputError, match="Did you mean 'size'"):
        open_encoder(f"hf:{tmp_path / 'vit'}?sise=30", view=view)
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    for changes, words in (
        ({"model_type": "swin"}, "type 'swin', which is none of ours"),
        ({"hidden_size": 48}, r"cls_token is \(1, 1, 32\) in the file and \(1, 1, 48\) in the model"),
        ({"model_type": "dinov2"}, r"weights of a Dinov2Model are not in the file, the first is \S+ \("),
    ):
        (tmp_path / "vit" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=words):
            open_encoder(f"hf:{tmp_path / 'vit'}", view=view)


class Danger:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/clustermim-hf-was-here",)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    write_hf(tmp_path, "ViTModel")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"cls_token": Danger()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="refused"):
        open_encoder(f"hf:{tmp_path}", view=make_view(3))
    assert not Path("/tmp/clustermim-hf-was-here").exists()


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"clustermim\[transformers\]"):
        open_encoder(f"hf:{tmp_path}")
