"""Weights: read from a file without running anything in it, loaded only where every tensor fits, and told apart."""

import argparse
import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clustermim.encoders.keymaps import unwrap
from clustermim.errors import InputError

FACTS_KEY = "clustermim"
"""Key under which our exports keep what the weights alone do not tell: mean, std, image size, heads."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, on the CPU.

    `.safetensors`, or whatever `torch.load(weights_only=True)` reads: no code in the file is ever run. Wrappers such as
    `model` or `state_dict` and the `module.` of data-parallel training are taken off.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    InputError
        No such file, a damaged one, one that would have to run code, or one without tensors.
    """
    content = read_without_running(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a mapping of names to tensors.")
    return dict(content) if Path(path).suffix == ".safetensors" else unwrap(content, str(path))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """All that a checkpoint file holds, whatever its layout; of a `.safetensors` file also our facts, as a mapping.

    Raises
    ------
    InputError
        No such file, a damaged one, one that would have to run code, or one that is no mapping.
    """
    content = read_without_running(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a mapping of names to tensors.")
    content = dict(content)
    if Path(path).suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get(FACTS_KEY)
        try:
            content |= {} if facts is None else {FACTS_KEY: json.loads(facts)}
        except ValueError as error:
            raise InputError(f"{path}: its metadata cannot be read ({error}). Export it again.") from error
    return content


def read_without_running(path: str | Path) -> Any:
    """What a `.safetensors` or PyTorch file holds, on the CPU, whatever its layout; no code in it is ever run.

    Raises
    ------
    InputError
        No such file, a damaged one, or one that would have to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There are no weights at {path}: no such file. Check the path.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # MAE, DINO and many others keep their command line beside the weights; a Namespace runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80"):
            raise InputError(f"{path} is not a checkpoint that PyTorch can read. Give .safetensors or .pth.") from error
        raise InputError(
            f"{path} is a pickle that holds more than tensors, and reading it could run code, so it is refused. "
            f"Where you trust it, load it yourself and save its weights with safetensors."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError, UnicodeDecodeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a checkpoint: {error}. Is it damaged or half downloaded?"
        ) from error


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], where: str, what: str) -> None:
    """Load weights into a model, all of them or none.

    Parameters
    ----------
    model
        Whose weights are set.
    state
        Names to tensors.
    where
        The file, for the error message.
    what
        The architecture, for the error message.

    Raises
    ------
    InputError
        A tensor of another shape, one missing or one too many: the first is named, with both shapes.
    """
    own = model.state_dict()
    shared = [key for key in own if key in state]
    problem = next(
        (
            f"its {key} is {shape(state[key])}, the model's is {shape(own[key])}"
            for key in shared
            if state[key].shape != own[key].shape
        ),
        None,
    )
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    if problem is None and missing:
        problem = f"the model's {missing[0]} {shape(own[missing[0]])} is not in it"
        problem += f" (it holds {extra[0]} {shape(state[extra[0]])} instead)" if extra else ""
    if problem is None and extra:
        problem = f"the model has no {extra[0]} {shape(state[extra[0]])}"
    if problem is not None:
        raise InputError(
            f"{where} holds the weights of another architecture than {what}: {problem}. "
            f"{len(shared)} of the model's {len(own)} names are in the file. Name the model they belong to."
        )
    model.load_state_dict(state, strict=True)


def shape(tensor: Tensor) -> str:
    """For example `(3, 16, 16)`."""
    return str(tuple(tensor.shape))


def fingerprint_of(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """16 hex digits of settings (JSON-able) and of every tensor: its name, shape, type and bits."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
