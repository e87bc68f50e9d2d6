"""Backbone features from checkpoint files made here: a small ViT with its layers, a small CNN on the patch grid."""

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from clustermim.data.views import ViewConfig
from clustermim.errors import InputError
from clustermim.features.patches import PatchFeatures, make_features, rebuild_features

VIT = "test_vit"
CNN = "test_resnet"


def view(side: int = 16, channels: int = 3, width: int | None = None) -> ViewConfig:
    half = (0.5,) * channels
    return ViewConfig(image_size=(side, width or side), channels=channels, mean=half, std=half)


def images(side: int = 16, channels: int = 3, width: int | None = None) -> torch.Tensor:
    return torch.rand(2, channels, side, width or side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of both networks, as .pth (wrapped, as trainers do) and as .safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    found = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in (VIT, CNN):
            model = timm.create_model(name)
            for p in model.parameters():  # zero-initialised scales would hide a wrong layer
                p.data.add_(0.02 * torch.randn_like(p))
            found[name] = folder / f"{name}.pth"
            torch.save({"model": model.state_dict()}, found[name])
            safetensors.torch.save_file(model.state_dict(), found[name].with_suffix(".safetensors"))
    return found


def reference(name: str, file: Path, **kwargs: object) -> torch.nn.Module:
    model = timm.create_model(name, **kwargs)
    model.load_state_dict(torch.load(file, weights_only=True)["model"])
    return model.eval()


@pytest.mark.parametrize("layer", [3, -1])
def test_vit_layers_are_timm_s(files: dict[str, Path], layer: int) -> None:
    # At 160 pixels and patches of 16 nothing is resized, so timm's own call is the oracle.
    features = make_features(f"backbone:{VIT}@{files[VIT]}?layer={layer}", patch_size=16, view=view(160))
    model = reference(VIT, files[VIT])
    x = images(160)
    with torch.no_grad():
        got = features(x)
        (want,) = model.forward_intermediates(
            (x - 0.5) / 0.5, indices=[layer % 6], norm=layer == -1, output_fmt="NLC", intermediates_only=True
        )
    assert got.shape == (2, 100, 64)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_vit_sees_small_images_so_that_its_patches_are_ours(files: dict[str, Path]) -> None:
    features = make_features(f"backbone:{VIT}@{files[VIT]}", patch_size=4, view=view(16, width=24))
    assert features.size == (64, 96)  # type: ignore[attr-defined]
    with torch.no_grad():
        assert features(images(16, width=24)).shape == (2, 4 * 6, 64)


@pytest.mark.parametrize("layer", [1, 3])
def test_cnn_maps_are_brought_to_the_patch_grid(files: dict[str, Path], layer: int) -> None:
    features = make_features(f"backbone:{CNN}@{files[CNN]}?layer={layer}&size=64", patch_size=4, view=view(32))
    model = reference(CNN, files[CNN])
    x = images(32)
    big = torch.nn.functional.interpolate(x, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        got = features(x)
        (found,) = model.forward_intermediates((big - mean) / std, indices=[layer], intermediates_only=True)
    finer = found.shape[2] >= 8
    want = (
        torch.nn.functional.adaptive_avg_pool2d(found, 8)
        if finer
        else torch.nn.functional.interpolate(found, (8, 8), mode="bilinear", antialias=True)
    )
    assert finer == (layer == 1) and got.shape == (2, 64, found.shape[1]) and features.dim == found.shape[1]
    torch.testing.assert_close(got, want.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_safetensors_and_pth_agree(files: dict[str, Path]) -> None:
    made = [
        make_features(f"backbone:{CNN}@{file}?size=64", patch_size=4, view=view())
        for file in (files[CNN], files[CNN].with_suffix(".safetensors"))
    ]
    with torch.no_grad():
        assert torch.equal(made[0](images()), made[1](images()))


@pytest.mark.parametrize(
    "spec", [f"backbone:{VIT}@FILE?layer=2", f"pixel+backbone:{CNN}@FILE?layer=1&size=64|balance=false"]
)
def test_rebuilt_without_the_file(files: dict[str, Path], spec: str) -> None:
    path = str(files[VIT if VIT in spec else CNN]).replace("+", "%2B")
    made: PatchFeatures = make_features(spec.replace("FILE", path), patch_size=4, view=view())
    again = rebuild_features({**made.config()})
    again.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images()), made(images()))
    assert not any(p.requires_grad for p in made.parameters())


def test_layers_behind_the_chosen_one_are_not_kept(files: dict[str, Path]) -> None:
    made = [make_features(f"backbone:{VIT}@{files[VIT]}?layer={n}", patch_size=4, view=view()) for n in (1, 5)]
    assert len(made[0].state_dict()) < len(made[1].state_dict()) / 2


def test_grey_images_reach_a_network_of_three_channels(files: dict[str, Path]) -> None:
    grey = make_features(f"backbone:{CNN}@{files[CNN]}?size=64", patch_size=4, view=view(channels=1))
    colour = make_features(f"backbone:{CNN}@{files[CNN]}?size=64", patch_size=4, view=view())
    x = images(channels=1)
    with torch.no_grad():
        torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)))


def test_batch_statistics_never_move(files: dict[str, Path]) -> None:
    made = make_features(f"backbone:{CNN}@{files[CNN]}?size=64", patch_size=4, view=view()).train()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    with torch.no_grad():
        made(images())
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("code in a checkpoint was run",))


def test_bad_backbones_are_told(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"model": Bomb()}, protocol=2))
    cases = {
        "backbone:test_resnt": "Did you mean 'test_resnet'",
        "backbone": "name a timm network",
        f"backbone:{CNN}@{tmp_path}/none.pth": "no such file",
        f"backbone:{CNN}@{tmp_path}/bomb.pth": "refused",
        f"backbone:{CNN}@{files[VIT]}": "does not hold the weights",
        f"backbone:{VIT}@{files[VIT]}?layer=6": "layers 0 to 5",
        f"backbone:{CNN}@{files[CNN]}?size=big": "HxW",
        f"backbone:{CNN}@{files[CNN]}?layr=1": "Did you mean 'layer'",
        "backbone:sknet": "timm has no model",
    }
    for spec, told in cases.items():
        with pytest.raises(InputError, match=told):
            make_features(spec, patch_size=4, view=view())


def test_without_the_hub_the_file_is_suggested() -> None:
    with pytest.raises(InputError, match="backbone:resnet18@FILE"):
        make_features("backbone:resnet18", patch_size=4, view=view())
