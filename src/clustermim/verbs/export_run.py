"""`clustermim export`: the encoder of a run in the form that timm, transformers, onnxruntime or MAE's code load."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from clustermim.encoders.exports.formats import FORMATS, Format
from clustermim.encoders.exports.subject import Subject, open_subject
from clustermim.errors import InputError, ResourceError, nearest
from clustermim.runs import atomic_save


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written."""

    out: Path
    format: str
    figures: dict[str, Any]
    """`max_difference` of the features from those of the run where the format is loaded back; see the writers."""

    def rows(self) -> list[dict[str, Any]]:
        """One flat record."""
        return [{"out": str(self.out), "format": self.format, **self.figures}]

    def __rich__(self) -> Table:
        """A table of two columns for the terminal."""
        table = Table(title=f"Exported for {self.format}: {self.out}", show_header=False, title_justify="left")
        for key, value in self.figures.items():
            shown = (
                f"{value:.1e}" if isinstance(value, float) else ", ".join(value) if isinstance(value, list) else value
            )
            table.add_row(key.replace("_", " "), str(shown))
        return table


def export_encoder(
    run: str | Path,
    *,
    format: Literal["timm", "transformers", "onnx", "mae"],
    out: Path,
) -> ExportResult:
    """Export the encoder of a run so that others load it without this package.

    timm: a folder for timm.create_model("local-dir:OUT"), or hf-hub: once it is uploaded. transformers: a folder for
    ViTModel.from_pretrained. onnx: one file, images in [0, 1] -> class token and patches, any batch size. mae: encoder
    and decoder under the names of MAE's code. The first three are loaded back and must give the run's features.

    Parameters
    ----------
    run
        Run directory of a pretraining or an import.
    format
        Who is to load it.
    out
        Folder (timm, transformers) or file (onnx: .onnx; mae: .pth or .safetensors) to make.

    Returns
    -------
    ExportResult
        Where it stands, and how far its features are from those of the run.

    Raises
    ------
    InputError
        No such run, something already at `out`, a library that is missing, or a format that cannot express the encoder.
    """
    out = Path(out)
    if format not in FORMATS:
        raise InputError(f"--format: there is no format {format!r}.{nearest(format, FORMATS)}")
    wanted = FORMATS[format]
    if out.exists() and not (wanted.folder and out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {out} exists already. Nothing was touched; choose another name.")
    if not wanted.folder and out.suffix not in wanted.suffixes:
        raise InputError(f"--out {out}: for --format {format} it must end in {' or '.join(wanted.suffixes)}.")
    subject = open_subject(run)
    figures = _write_folder(wanted, subject, out) if wanted.folder else _write_file(wanted, subject, out)
    return ExportResult(out=out, format=format, figures=figures)


def _write_file(wanted: Format, subject: Subject, out: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    atomic_save(out, lambda temporary: figures.update(wanted.write(subject, temporary, out)))
    return figures


def _write_folder(wanted: Format, subject: Subject, out: Path) -> dict[str, Any]:
    """Fill a folder beside `out`, then put it in place in one step."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=".partial-"))
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error.strerror or error}. Choose another place.") from None
    try:
        figures = wanted.write(subject, temporary, out)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~umask)  # some writers keep what they write to themselves
        temporary.replace(out)
    except OSError as error:
        raise ResourceError(f"{out} could not be written: {error.strerror or error}. Free some space.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return figures
