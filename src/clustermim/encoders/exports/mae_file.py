"""The whole model, encoder and decoder, in the layout that MAE's code and its many descendants read."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from clustermim.encoders.exports.subject import Subject
from clustermim.encoders.keymaps import is_decoder_key
from clustermim.encoders.weights import FACTS_KEY, read_weights
from clustermim.errors import InputError

MODEL_FILE = "model.safetensors"
"""What a run keeps its encoder and decoder in, already under these names."""


def write_mae(subject: Subject, file: Path, shown: Path) -> dict[str, Any]:
    """Write `.pth`, as MAE does under the key `model`, or `.safetensors`.

    What the weights do not tell (mean, std, image size, heads) stands beside them under `clustermim`, where MAE's code
    does not look and `import` finds it.

    Parameters
    ----------
    subject
        What to export; the decoder is left out where the run has none.
    file
        Where to write; by its suffix the format is chosen.
    shown
        Where it will stand, for messages.

    Returns
    -------
    dict
        `tensors`, and `decoder`: whether there is one.

    Raises
    ------
    InputError
        Another suffix, or an encoder that is no plain ViT.
    """
    if shown.suffix not in (".pth", ".pt", ".safetensors"):
        raise InputError(f"--out {shown}: a checkpoint in MAE layout ends in .pth or .safetensors.")
    whole = subject.run / MODEL_FILE
    state = read_weights(whole if whole.is_file() else subject.run / "encoder.safetensors")
    if "cls_token" not in state or "patch_embed.proj.weight" not in state:
        raise InputError(f"{subject.run} holds no ViT with a class token, so the MAE layout has no names for it.")
    facts = {
        "mean": subject.mean,
        "std": subject.std,
        "image_size": list(subject.image_size),
        "heads": subject.manifest["model"]["kwargs"].get("num_heads"),
    }
    if shown.suffix == ".safetensors":
        metadata = {"format": "pt", FACTS_KEY: json.dumps(facts)}
        safetensors.torch.save_file(state, file, metadata=metadata)
    else:
        torch.save({"model": state, FACTS_KEY: facts}, file)
    return {"tensors": len(state), "decoder": any(is_decoder_key(key) for key in state)}
