"""Exports are loaded by their own libraries and give the features of the run, at two image sizes, square and not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from clustermim.encoders.contract import EncoderOutput
from clustermim.encoders.exports.subject import open_subject
from clustermim.encoders.exports.transformers_folder import why_no_vit_model
from clustermim.encoders.keymaps import is_decoder_key
from clustermim.encoders.opening import open_encoder
from clustermim.encoders.presets import model_kwargs
from clustermim.encoders.weights import read_weights
from clustermim.errors import InputError
from clustermim.runs import RunDirectory
from clustermim.verbs.export_run import export_encoder
from door_samples import MEAN, STD, random_weights, write_tiny_run

SIZES = [(32, 32), (24, 40)]


def features(run: Path, images: torch.Tensor) -> EncoderOutput:
    with torch.no_grad():
        return open_encoder(run)(images)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


@pytest.mark.parametrize("size", SIZES)
def test_timm_loads_the_folder(size: tuple[int, int], tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run", size)
    result = export_encoder(run, format="timm", out=tmp_path / "timm")
    assert result.figures["max_difference"] <= 1e-5
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert [list(config[key]) for key in ("mean", "std", "input_size")] == [MEAN, STD, [3, *size]]
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        tokens = model.forward_features(normalised(images))
    expected = features(run, images)
    torch.testing.assert_close(tokens[:, 0], expected.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, 1:], expected.patches, rtol=0, atol=1e-5)
    card = (tmp_path / "timm" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "photos" in card and "somebody" not in card
    assert str(tmp_path) not in card


def test_timm_loads_it_in_a_process_without_us(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run")
    export_encoder(run, format="timm", out=tmp_path / "timm")
    images = torch.rand(1, 3, 24, 32)
    safetensors.torch.save_file({"images": normalised(images)}, tmp_path / "in.safetensors")
    code = (
        "import sys, timm, torch, safetensors.torch as s\n"
        "model = timm.create_model('local-dir:timm', pretrained=True).eval()\n"
        "with torch.no_grad():\n"
        "    s.save_file({'out': model(s.load_file('in.safetensors')['images'])}, 'out.safetensors')\n"
        "assert not [name for name in sys.modules if name.startswith('clustermim')]\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")["out"]
    torch.testing.assert_close(found, features(run, images).cls, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_transformers_loads_the_folder(size: tuple[int, int], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = write_tiny_run(tmp_path / "run", size)
    result = export_encoder(run, format="transformers", out=tmp_path / "hf")
    assert result.figures["max_difference"] <= 1e-5
    model, report = transformers.ViTModel.from_pretrained(
        tmp_path / "hf", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = torch.rand(2, 3, *size)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = processor(images=images, do_rescale=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = model.eval()(pixel_values=pixels).last_hidden_state
        ours = open_encoder(f"hf:{tmp_path / 'hf'}")(images)
    expected = features(run, images)
    torch.testing.assert_close(tokens[:, 0], expected.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, 1:], expected.patches, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.patches, expected.patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs", "why"),
    [
        ("vit_tiny_patch16_224", {"init_values": 1e-5}, "LayerScale"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "after pooling"),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "exactly one class token"),
        ("vit_tiny_patch16_224", {"pre_norm": True}, "before the first block"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "norms queries and keys"),
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}, "QuickGELU"),
        ("vit_tiny_patch16_224", {"proj_bias": False}, "no biases"),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, "no stored position"),
        ("vit_small_patch16_18x2_224", {}, "plain ones"),
        ("beit_base_patch16_224", {}, "a Beit, not a VisionTransformer"),
    ],
)
def test_what_a_vit_model_cannot_compute_is_told(name: str, kwargs: dict[str, object], why: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **kwargs)
    assert why in str(why_no_vit_model(model))


def test_qkv_without_bias_is_what_a_vit_model_can_compute(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    kwargs = {"img_size": [16, 16], "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "qkv_bias": False}
    model = random_weights(timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs))
    data = {"image_size": [16, 16], "channels": 3, "mean": [0.5], "std": [0.5]}
    with RunDirectory(tmp_path / "run", "pretrain", {}) as run:
        safetensors.torch.save_file(model.state_dict(), run.path / "encoder.safetensors")
        run.finish({"model": {"name": "vit_tiny_patch16_224", "kwargs": kwargs}, "data": data})
    assert export_encoder(tmp_path / "run", format="transformers", out=tmp_path / "hf").figures["max_difference"] < 1e-5
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["qkv_bias"] is False


def test_onnxruntime_runs_the_file_on_any_number_of_images(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = write_tiny_run(tmp_path / "run")
    result = export_encoder(run, format="onnx", out=tmp_path / "encoder.onnx")
    assert result.figures["max_difference"] <= 1e-4 and result.figures["outputs"] == ["cls", "patches"]
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = torch.rand(count, 3, 24, 32)
        cls, patches = session.run(["cls", "patches"], {"images": images.numpy()})
        expected = features(run, images)
        torch.testing.assert_close(torch.from_numpy(cls), expected.cls, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(patches), expected.patches, rtol=0, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_mae_layout_holds_encoder_and_decoder(suffix: str, tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run")
    out = tmp_path / f"mae{suffix}"
    assert export_encoder(run, format="mae", out=out).figures["decoder"] is True
    state, whole = read_weights(out), safetensors.torch.load_file(run / "model.safetensors")
    assert set(state) == set(whole) and all(torch.equal(state[key], whole[key]) for key in whole)
    # what the weights do not tell came along: 128-wide heads, a rectangular grid, mean and std
    images = torch.rand(1, 3, 24, 32)
    with torch.no_grad():
        torch.testing.assert_close(open_encoder(f"mae:{out}")(images).cls, features(run, images).cls)
    (run / "model.safetensors").unlink()
    result = export_encoder(run, format="mae", out=tmp_path / f"encoder{suffix}")
    assert result.figures["decoder"] is False
    assert not any(is_decoder_key(key) for key in read_weights(result.out))


def test_an_export_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clustermim.encoders.exports import timm_folder

    run = write_tiny_run(tmp_path / "run")
    save = safetensors.torch.save_file

    def spoil(state: dict[str, torch.Tensor], *args: object, **kwargs: object) -> None:
        save(state | {"norm.bias": state["norm.bias"] + 1e-3}, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(timm_folder.safetensors.torch, "save_file", spoil)
    with pytest.raises(InputError, match="gives other features"):
        export_encoder(run, format="timm", out=tmp_path / "timm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (160, 192)])
@pytest.mark.parametrize("preset", ["vit_ti", "vit_s"])
def test_true_sizes_agree(preset: str, size: tuple[int, int], tmp_path: Path) -> None:
    name, kwargs = model_kwargs(preset, size, 16, 3)
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs, num_classes=0)
    data = {"image_size": list(size), "channels": 3, "mean": MEAN, "std": STD}
    with RunDirectory(tmp_path / "run", "pretrain", {}) as run:
        safetensors.torch.save_file(model.state_dict(), run.path / "encoder.safetensors")
        run.finish({"model": {"name": name, "kwargs": kwargs}, "data": data})
    subject = open_subject(tmp_path / "run")
    assert subject.image_size == size
    for format, out, most in (("timm", "t", 1e-5), ("transformers", "h", 1e-5), ("onnx", "o.onnx", 1e-4)):
        result = export_encoder(tmp_path / "run", format=format, out=tmp_path / out)  # type: ignore[arg-type]
        assert result.figures["max_difference"] <= most
