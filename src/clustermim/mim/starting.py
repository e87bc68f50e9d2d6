"""Where weights come from and where they go: an earlier encoder to continue from, and the files a run leaves behind."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import timm
from torch import Tensor

from clustermim.encoders.keymaps import to_mae_layout, to_timm
from clustermim.encoders.weights import load_exactly, read_weights
from clustermim.errors import InputError
from clustermim.mim.contract import MaskedModel
from clustermim.runs import atomic_save

ENCODER_FILE = "encoder.safetensors"
"""The encoder alone, under timm's keys."""

MODEL_FILE = "model.safetensors"
"""Encoder and decoder, under the keys of the MAE layout."""


def continue_from(model: MaskedModel, spec: str | Path) -> None:
    """Give the encoder of `model` the weights of another, positions included; the decoder starts afresh.

    Parameters
    ----------
    model
        Its encoder is overwritten.
    spec
        A run directory, a file of timm or MAE-layout weights, or `timm:<name>` for weights from the hub and
        `timm:<name>@<file>` for a file.

    Raises
    ------
    InputError
        Nothing is there, or the weights are those of another architecture, image size or patch size.
    """
    text = str(spec)
    name, _, file = text.removeprefix("timm:").partition("@")
    if text.startswith("timm:") and not file:
        state = _from_hub(name)
    else:
        path = Path(file if text.startswith("timm:") else text)
        if path.is_dir():
            if not (path / ENCODER_FILE).is_file():
                raise InputError(f"--init {path} holds no {ENCODER_FILE}: it is no finished run. Give one, or a file.")
            path = path / ENCODER_FILE
        state = read_weights(path)
    state = {key: value for key, value in to_timm(state).items() if not key.startswith(("head.", "fc_norm."))}
    load_exactly(model.encoder, state, f"--init {text}", "the encoder asked for")


def _from_hub(name: str) -> dict[str, Tensor]:
    if not timm.is_model(name):
        raise InputError(f"--init timm:{name}: timm knows no such model. See timm.list_models(pretrained=True).")
    try:
        state: dict[str, Tensor] = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:
        raise InputError(
            f"--init timm:{name}: the weights could not be fetched ({error}). Without network, give --init "
            f"timm:{name}@FILE."
        ) from error
    return state


def save_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the encoder for timm and the whole model in the MAE layout into `folder`, each whole or not at all.

    Parameters
    ----------
    state
        Of a `MaskedModel`, its tensors whole.
    folder
        Where to.
    """
    encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    for name, part in ((ENCODER_FILE, encoder), (MODEL_FILE, to_mae_layout(state))):
        tensors = {key: value.detach().cpu().contiguous() for key, value in part.items()}
        atomic_save(
            folder / name,
            lambda path, tensors=tensors: safetensors.torch.save_file(tensors, path, metadata={"format": "pt"}),  # type: ignore[misc]
        )
