"""One suite for every kind of encoder: shapes, determinism, batch splits, rectangles, 1, 3 and 5 channels."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from encoder_samples import HEIGHT, WIDTH, make_view, tiny_vit, write_run
from hf_samples import write_hf
from torch import nn

from clustermim.encoders.contract import Encoder
from clustermim.encoders.opening import open_encoder


def cnn_module(channels: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=0, in_chans=channels)


def plain_module(channels: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 12, 8, 8), nn.BatchNorm2d(12), nn.GELU())


def hf_model(name: str) -> Callable[[Path, int], str]:
    return lambda folder, channels: f"hf:{write_hf(folder, name, channels)}?size={HEIGHT}x{WIDTH}"


def mae_file(folder: Path, channels: int) -> str:
    folder.mkdir(exist_ok=True)
    torch.save({"model": tiny_vit(channels).state_dict()}, folder / "mae.pth")
    return f"mae:{folder / 'mae.pth'}?heads=2&size={HEIGHT}x{WIDTH}"


KINDS: dict[str, Callable[[Path, int], object]] = {
    "run": write_run,
    "hf vit": hf_model("ViTModel"),
    "hf vit_mae": hf_model("ViTMAEForPreTraining"),
    "hf dinov2": hf_model("Dinov2Model"),
    "hf dinov2 with registers": hf_model("Dinov2WithRegistersModel"),
    "hf beit": hf_model("BeitModel"),
    "hf beit, masked": hf_model("BeitForMaskedImageModeling"),
    "mae": mae_file,
    "random preset": lambda folder, channels: "random:vit_micro?patch_size=8",
    "random timm cnn": lambda folder, channels: "random:test_efficientnet",
    "random timm vit": lambda folder, channels: "random:test_vit?patch_size=8",
    "raw pixels": lambda folder, channels: "raw-pixels",
    "timm vit object": lambda folder, channels: tiny_vit(channels),
    "timm cnn object": lambda folder, channels: cnn_module(channels),
    "any module": lambda folder, channels: plain_module(channels),
}


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_encoder_keeps_the_contract(kind: str, channels: int, tmp_path: Path) -> None:
    make = lambda: open_encoder(KINDS[kind](tmp_path / "run", channels), view=make_view(channels))  # noqa: E731
    encoder = make()
    assert isinstance(encoder, Encoder) and not encoder.training and encoder.channels == channels
    images = torch.rand(5, channels, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = encoder(images)
        again = make()(images)
        parts = [encoder(images[:2]), encoder(images[2:])]
        every = encoder.layers(images, range(encoder.depth))
    vectors = whole.pooled(encoder.global_name)
    assert vectors and all(v.shape[0] == 5 and v.ndim == 2 and v.isfinite().all() for v in vectors.values())
    for pool, vector in vectors.items():
        assert torch.equal(vector, again.pooled(encoder.global_name)[pool]), "two openings differ"
        split = torch.cat([part.pooled(encoder.global_name)[pool] for part in parts])
        torch.testing.assert_close(split, vector, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(every[-1].pooled(encoder.global_name)[pool], vector, rtol=1e-4, atol=1e-5)
    assert len(every) == encoder.depth
    assert all(e.cls is not None or e.patches is not None for e in every)
    swapped = encoder.layers(images, [-1, 0])
    assert len(swapped) == 2
    last_patches, first_patches = swapped[0].patches, swapped[1].patches
    if whole.patches is not None:
        assert last_patches is not None and first_patches is not None
        torch.testing.assert_close(last_patches, whole.patches, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first_patches, every[0].patches, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["run", "random preset", "timm vit object"])
def test_vits_give_class_token_and_row_major_patches(kind: str, tmp_path: Path) -> None:
    encoder = open_encoder(KINDS[kind](tmp_path / "run", 3), view=make_view(3))  # type: ignore[arg-type]
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    with torch.no_grad():
        output = encoder(images)
        tokens = encoder.model.forward_features((images - encoder._mean) / encoder._std)  # type: ignore[attr-defined]
    assert output.cls is not None and output.patches is not None
    assert output.patches.shape[1] == (HEIGHT // 8) * (WIDTH // 8)
    assert encoder.patch_grid(HEIGHT, WIDTH) == (HEIGHT // 8, WIDTH // 8)  # type: ignore[attr-defined]
    torch.testing.assert_close(output.cls, tokens[:, 0])
    torch.testing.assert_close(output.patches, tokens[:, 1:])


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "test_mambaout"])
def test_features_equal_timms_own_forward(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    encoder = open_encoder(model)
    size = encoder.image_size or (64, 96)
    images = torch.rand(2, 3, *size)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = model((images - mean) / std)
        output = encoder(images)
    vectors = output.pooled()
    torch.testing.assert_close(vectors.get("cls", vectors["mean"]), expected, rtol=1e-4, atol=1e-5)


def test_intermediate_layers_are_normed_block_outputs() -> None:
    model = tiny_vit(3)
    encoder = open_encoder(model)
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in model.blocks]  # type: ignore[union-attr]
    with torch.no_grad():
        outputs = encoder.layers(images, range(3))
        for hook in hooks:
            hook.remove()
        for output, block in zip(outputs, seen, strict=True):
            normed = model.norm(block)  # type: ignore[operator]
            assert output.cls is not None and output.patches is not None
            torch.testing.assert_close(torch.cat([output.cls[:, None], output.patches], 1), normed)


def test_random_encoders_are_seeded_and_leave_the_global_generator_alone() -> None:
    images, view = torch.rand(1, 3, HEIGHT, WIDTH), make_view(3)
    state = torch.get_rng_state()
    with torch.no_grad():
        a, b, c = (
            open_encoder(f"random:vit_micro?patch_size=8&seed={seed}", view=view)(images).cls for seed in (0, 0, 1)
        )
    assert a is not None and b is not None and c is not None
    assert torch.equal(a, b) and not torch.allclose(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_raw_pixels_are_the_pixels() -> None:
    view = make_view(1)
    image = torch.rand(2, 1, HEIGHT, WIDTH)
    features = open_encoder("raw-pixels", view=view)(image).cls
    torch.testing.assert_close(features, ((image - 0.4) / 0.3).flatten(1))
    large = open_encoder("raw-pixels", view=view)(torch.rand(2, 1, 90, 120)).cls
    assert large is not None and large.shape == (2, 24 * 32)


def test_grey_images_serve_a_colour_encoder_and_the_reverse() -> None:
    colour, grey = open_encoder(tiny_vit(3)), open_encoder(tiny_vit(1))
    image = torch.rand(2, 1, HEIGHT, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(colour(image).cls, colour(image.expand(-1, 3, -1, -1)).cls)
        torch.testing.assert_close(grey(image.expand(-1, 3, -1, -1)).cls, grey(image).cls, rtol=1e-4, atol=1e-4)


def test_timm_alone_builds_the_encoder_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5)
    model = json.loads((run / "manifest.json").read_text())["model"]
    plain = timm.create_model(
        model["name"], **model["kwargs"], num_classes=0, checkpoint_path=str(run / "encoder.safetensors")
    ).eval()
    images = torch.rand(3, 5, HEIGHT, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(open_encoder(run)(images).cls, plain((images - 0.4) / 0.3), rtol=1e-5, atol=1e-5)
