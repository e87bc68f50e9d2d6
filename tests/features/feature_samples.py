"""Images, views, weights and runs that the tests of this room share."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import timm
import torch

from clustermim.data.counted import uniform
from clustermim.data.views import ViewConfig
from clustermim.encoders.presets import model_kwargs

CNN = "test_resnet"


def view(height: int = 16, width: int = 24, channels: int = 3) -> ViewConfig:
    mean, std = torch.linspace(0.3, 0.6, channels).tolist(), torch.linspace(0.1, 0.4, channels).tolist()
    return ViewConfig(image_size=(height, width), channels=channels, mean=tuple(mean), std=tuple(std))


def images(height: int = 16, width: int = 24, channels: int = 3, count: int = 7) -> torch.Tensor:
    """Coarse shapes and fine noise, so that neighbouring pixels correlate."""
    noise = uniform(height, torch.arange(count * channels * height * width)).view(count, channels, height, width)
    coarse = torch.nn.functional.interpolate(noise[:, :, ::4, ::4], (height, width), mode="bilinear")
    return 0.7 * coarse + 0.3 * noise


def passes(x: torch.Tensor, batch: int) -> Callable[[], Iterator[torch.Tensor]]:
    return lambda: iter(x.split(batch))


def write_weights(folder: Path, name: str = CNN) -> Path:
    """Weights of a small timm network, as .safetensors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name)
        for p in model.parameters():  # zero-initialised scales would hide a wrong layer
            p.data.add_(0.02 * torch.randn_like(p))
    file = folder / f"{name}.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    return file


def write_run(folder: Path, shown: ViewConfig, patch_size: int) -> Path:
    """A run directory as `pretrain` leaves it, of a tiny encoder with statistics of its own."""
    name, kwargs = model_kwargs("vit_micro", shown.image_size, patch_size, shown.channels)
    kwargs |= {"embed_dim": 32, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, **kwargs, num_classes=0)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), folder / "encoder.safetensors")
    facts = {"mean": [0.45] * shown.channels, "std": [0.2] * shown.channels, "channels": shown.channels}
    manifest = {"kind": "pretrain", "status": "finished", "model": {"name": name, "kwargs": kwargs}}
    manifest["data"] = facts | {"image_size": list(shown.image_size)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
