"""Runs and foreign checkpoints of tiny models, every weight random."""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from clustermim.mim.building import build_model
from clustermim.mim.model import MaskedImageModel
from clustermim.mim.starting import save_weights
from clustermim.runs import RunDirectory

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def random_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters drawn anew, so that none is left at a zero that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def tiny_mim(image_size: tuple[int, int] = (24, 32), seed: int = 0) -> tuple[MaskedImageModel, dict[str, Any]]:
    model, recipe = build_model(
        "vit_micro", image_size=image_size, patch_size=8, channels=3, output_dim=7, mean=MEAN, std=STD
    )
    random_weights(model, seed)
    return model, recipe


def write_tiny_run(folder: Path, image_size: tuple[int, int] = (24, 32)) -> Path:
    """What `pretrain` leaves behind, without the training."""
    model, recipe = tiny_mim(image_size)
    data = {"name": "/home/somebody/photos", "split": "train", "images": 9, "classes": ["a", "b"], "channels": 3}
    data |= {"image_size": list(image_size), "mean": MEAN, "std": STD}
    config = {"data": "photos", "target": "token", "tokenizer": "/home/somebody/tokens", "epochs": 3}
    with RunDirectory(folder, "pretrain", config) as run:
        save_weights(model.state_dict(), run.path)
        run.finish({"model": recipe, "data": data})
    return folder


def tiny_vit(**changes: Any) -> nn.Module:
    """A ViT of 32 × 32 pixels as DINO and its kin save one; its width is usual, so that its heads are known."""
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3} | changes
    return random_weights(timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs))


def tiny_beit(**changes: Any) -> nn.Module:
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4} | changes
    return random_weights(timm.create_model("beit_base_patch16_224", num_classes=0, **kwargs))


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def foreign_content(kind: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """The same weights as one project or another saves them, beside things that are not to be taken for them."""
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    head = {"head.mlp.0.weight": torch.ones(3, 3)}
    contents: dict[str, dict[str, Any]] = {
        "bare": state,
        "mae": {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 799},
        "dino": {
            "student": prefixed("module.backbone.", other) | prefixed("module.", head),
            "teacher": prefixed("backbone.", state) | head,
            "args": argparse.Namespace(arch="vit_small"),
        },
        "ibot": {"state_dict": state | {"masked_embed": torch.ones(1, 192)}},
        "moco": {
            "state_dict": prefixed("module.base_encoder.", other)
            | prefixed("module.momentum_encoder.", state)
            | prefixed("module.predictor.", head)
        },
        "ema": {"model": other, "model_ema": state},
        "lightning": {"state_dict": prefixed("backbone.", state), "hyper_parameters": {"lr": 0.1}},
    }
    return contents[kind]
