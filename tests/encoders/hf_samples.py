"""Folders as `save_pretrained` writes them, of tiny Hugging Face models with random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

# Loaded here, once, so that no single test pays for it.
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
EXTRA: dict[str, dict[str, Any]] = {
    "ViTModel": {"intermediate_size": 64},
    "ViTMAEForPreTraining": {
        "intermediate_size": 64,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    },
    "Dinov2Model": {},
    "Dinov2WithRegistersModel": {},
    "BeitModel": {"intermediate_size": 64, "use_relative_position_bias": True},
    "BeitForMaskedImageModeling": {"intermediate_size": 64, "use_shared_relative_position_bias": True},
}
CONFIGS = {"ViTMAEForPreTraining": "ViTMAEConfig", "BeitForMaskedImageModeling": "BeitConfig"}


def make_hf(name: str, channels: int = 3, **changes: Any) -> Any:
    """A model of this class, every weight random, also those that are made as zeros."""
    config = getattr(transformers, CONFIGS.get(name, name.replace("Model", "Config")))
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(**SIZES, **EXTRA[name], num_channels=channels, **changes))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def write_hf(folder: Path, name: str, channels: int = 3) -> Path:
    make_hf(name, channels).save_pretrained(folder)
    return folder


def write_preprocessor(folder: Path, **settings: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
