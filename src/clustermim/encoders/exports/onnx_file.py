"""An ONNX file: images in [0, 1] in, class token and patches out, any number of images at a time."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clustermim.encoders.contract import EncoderOutput
from clustermim.encoders.exports.subject import Subject, check_difference
from clustermim.errors import InputError

_LARGEST = 2**31
"""Bytes that a file of protocol buffers can hold; larger models would need their weights in a second file."""


def write_onnx(subject: Subject, file: Path, shown: Path) -> dict[str, Any]:
    """Write the encoder, its normalisation included, as one ONNX file.

    Parameters
    ----------
    subject
        What to export.
    file
        Where to write.
    shown
        Where it will stand, for messages.

    Returns
    -------
    dict
        `max_difference`: between the features of the run and of what onnxruntime computes, over batches of 1 and 3;
        `outputs`: names of the outputs.

    Raises
    ------
    InputError
        The libraries are missing, the model is too large, cannot be traced, or onnxruntime gives other features.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"--format onnx needs {name} ({error}): pip install 'clustermim[onnx]'.") from None
    size = sum(p.numel() * p.element_size() for p in subject.encoder.state_dict().values())
    if size > 0.95 * _LARGEST:
        raise InputError(f"{subject.run} has {size:,} bytes of weights; an ONNX file holds {_LARGEST:,} at most.")
    sample = subject.images(2)
    with torch.no_grad():
        found = subject.encoder(sample)
    names = [name for name, value in zip(("cls", "patches"), found, strict=True) if value is not None]
    wrapped = _Tensors(subject.encoder, names).eval()
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                wrapped,
                (sample,),
                input_names=["images"],
                output_names=names,
                dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            _describe(program, subject)
            program.save(str(file), external_data=False)
    except Exception as error:  # tracing fails in as many ways as there are operators
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{subject.run} cannot be traced to ONNX by torch {torch.__version__}: {reason}") from error

    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def forward(images: Tensor) -> EncoderOutput:
        values = dict(zip(names, session.run(names, {"images": images.numpy()}), strict=True))
        cls, patches = (None if values.get(n) is None else torch.from_numpy(values[n]) for n in ("cls", "patches"))
        return EncoderOutput(cls=cls, patches=patches)

    difference = max(subject.difference(forward, count) for count in (1, 3))
    check_difference(difference, 1e-4, str(shown))
    return {"max_difference": difference, "outputs": names}


class _Tensors(nn.Module):
    """An encoder that returns plain tensors, and only those it has."""

    def __init__(self, encoder: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.encoder, self.names = encoder, names

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output: EncoderOutput = self.encoder(images)
        return tuple(getattr(output, name) for name in self.names)


def _describe(program: Any, subject: Subject) -> None:
    """Say in the file what its input is; the normalisation is part of the graph."""
    program.model.doc_string = (
        "clustermim encoder. Input `images`: (batch, channels, height, width) in [0, 1], not normalised. Outputs: "
        "`cls` (batch, dim), the global vector; `patches` (batch, patches, dim), row-major."
    )
    program.model.metadata_props["run"] = subject.run.name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on optional packages and deprecated internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
