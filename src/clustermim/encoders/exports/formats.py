"""The formats that an encoder can be exported to: one line a format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustermim.encoders.exports.mae_file import write_mae
from clustermim.encoders.exports.onnx_file import write_onnx
from clustermim.encoders.exports.subject import Subject
from clustermim.encoders.exports.timm_folder import write_timm
from clustermim.encoders.exports.transformers_folder import write_transformers


@dataclass(frozen=True)
class Format:
    """How one format is written."""

    write: Callable[[Subject, Path, Path], dict[str, Any]]
    """(what, a new folder or file to write to, where it will stand) -> figures; raises where features differ."""
    folder: bool
    """Whether it is a folder; else a file."""
    suffixes: tuple[str, ...] = ()
    """What a file may end in."""


FORMATS: dict[str, Format] = {
    "timm": Format(write_timm, folder=True),
    "transformers": Format(write_transformers, folder=True),
    "onnx": Format(write_onnx, folder=False, suffixes=(".onnx",)),
    "mae": Format(write_mae, folder=False, suffixes=(".pth", ".pt", ".safetensors")),
}
