"""Tiny encoders that the tests of this room share."""

import json
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import nn

from clustermim.data.views import ViewConfig
from clustermim.encoders.presets import model_kwargs

HEIGHT, WIDTH = 24, 32
TINY_VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": (HEIGHT, WIDTH), "patch_size": 8}


def make_view(channels: int) -> ViewConfig:
    return ViewConfig(image_size=(HEIGHT, WIDTH), channels=channels, mean=(0.4,) * channels, std=(0.3,) * channels)


def write_run(folder: Path, channels: int) -> Path:
    """A run directory as `pretrain` leaves it, of a tiny encoder."""
    name, kwargs = model_kwargs("vit_micro", (HEIGHT, WIDTH), 8, channels)
    kwargs |= {"embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs, num_classes=0)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), folder / "encoder.safetensors")
    facts = {"mean": [0.4] * channels, "std": [0.3] * channels, "channels": channels, "image_size": [HEIGHT, WIDTH]}
    manifest = {"kind": "pretrain", "status": "finished", "model": {"name": name, "kwargs": kwargs}, "data": facts}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def tiny_vit(channels: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=channels, **TINY_VIT)
