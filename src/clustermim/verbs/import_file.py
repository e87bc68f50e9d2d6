"""`clustermim import`: a checkpoint of another project becomes a run directory, an encoder for every verb."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
from cyclopts import Parameter
from rich.table import Table
from torch import Tensor, nn

from clustermim.data.options import SIZES
from clustermim.encoders.building import timm_from_file
from clustermim.encoders.foreign import DECODER_HEADS, ForeignViT, read_foreign
from clustermim.encoders.timm_encoder import TimmEncoder, declared_statistics
from clustermim.errors import InputError, nearest
from clustermim.mim.starting import ENCODER_FILE, MODEL_FILE
from clustermim.runs import RunDirectory, atomic_save

KIND = "import"
_NUMBERS = Parameter(consume_multiple=True, negative="")


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What was imported."""

    out: Path
    """The run directory: a name of an encoder for every verb."""
    model: dict[str, Any]
    """``{"name", "kwargs"}`` for ``timm.create_model``."""
    figures: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """One flat record."""
        return [{"run": str(self.out), "model": self.model["name"], **self.figures}]

    def __rich__(self) -> Table:
        """A table of two columns for the terminal."""
        table = Table(title=f"Imported encoder: {self.out}", show_header=False, title_justify="left")
        for key, value in self.rows()[0].items():
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            table.add_row(key.replace("_", " "), str(shown))
        return table


def import_checkpoint(
    checkpoint: Path,
    *,
    format: Literal["mae", "timm"],
    out: Path,
    model: str | None = None,
    image_size: Annotated[int | tuple[int, ...] | None, SIZES] = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    mean: Annotated[tuple[float, ...] | None, _NUMBERS] = None,
    std: Annotated[tuple[float, ...] | None, _NUMBERS] = None,
) -> ImportResult:
    """Import a checkpoint of another project as a run directory.

    mae: the layout of MAE, with its decoder where the file holds one. timm: the encoder alone; ViTs of DINO, iBOT, MoCo
    v3 and BEiT are recognised by their tensors (of teacher and student the teacher is taken), or --model names any
    timm model. Files are read without running code.

    Parameters
    ----------
    checkpoint
        `.pth` or `.safetensors`.
    format
        `mae` or `timm`.
    out
        Run directory to make.
    model
        For --format timm: the timm model that the weights belong to; default: a ViT or BEiT sized by its tensors.
    image_size
        Resample position embeddings to this size: a side, or height and width. Default: that of the file.
    heads
        Attention heads, where the width of the ViT does not tell them.
    decoder_heads
        The same for the decoder of --format mae.
    mean
        What was taken off each channel of images in [0, 1]; default: ImageNet's for colour, 0.5 for BEiT.
    std
        What they were divided by.

    Returns
    -------
    ImportResult
        The run directory, the model, and what was left out.

    Raises
    ------
    InputError
        No such file, a pickle with code, another architecture (the first name that does not fit and both shapes are
        told), or something that the file leaves open.
    """
    if format not in ("mae", "timm"):
        raise InputError(f"--format: there is no format {format!r}.{nearest(format, ('mae', 'timm'))}")
    if model is not None and format == "mae":
        raise InputError("--model goes with --format timm; a checkpoint in MAE layout tells its own sizes.")
    size = None
    if image_size is not None:
        sides = (image_size,) if isinstance(image_size, int) else tuple(image_size)
        if len(sides) not in (1, 2) or min(sides) < 1:
            raise InputError(f"--image-size takes a side, or height and width, not {' '.join(map(str, sides))}.")
        size = (sides[0], sides[-1])
    checkpoint = Path(checkpoint)
    if model is None:
        found = read_foreign(checkpoint, image_size=size, heads=heads, mean=mean, std=std)
        if format == "mae" and found.layout != "vit":
            raise InputError(f"{checkpoint} holds a BEiT, not a ViT in MAE layout: use --format timm.")
        built = found.build(str(checkpoint))
        facts, decoder = _foreign_facts(found), found.decoder if format == "mae" else {}
    else:
        built, facts = _named(checkpoint, model, size, heads, mean, std)
        decoder = {}
    told = _decoder_facts(decoder, decoder_heads, str(checkpoint))
    # The encoder must work before anything is written.
    TimmEncoder(built, str(checkpoint), **_contract(facts["data"]))
    config = {
        "checkpoint": str(checkpoint),
        "format": format,
        "model": model,
        "image_size": None if size is None else list(size),
        "heads": heads,
        "decoder_heads": decoder_heads,
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
    }
    with RunDirectory(out, KIND, {key: value for key, value in config.items() if value is not None}) as run:
        _save(built.state_dict(), run.path / ENCODER_FILE)
        if decoder:
            _save(found.encoder | decoder, run.path / MODEL_FILE)
        facts["data"]["name"] = checkpoint.name
        run.finish(facts | told | {"checkpoint_sha256": _digest(checkpoint)})
    figures = {
        "image_size": list(facts["data"]["image_size"]),
        "channels": facts["data"]["channels"],
        "parameters": sum(p.numel() for p in built.parameters()),
        "decoder": bool(decoder),
        "left_out": facts["left_out"],
    }
    return ImportResult(out=run.path, model=facts["model"], figures=figures)


def _foreign_facts(found: ForeignViT) -> dict[str, Any]:
    data = {
        "image_size": list(found.image_size),
        "channels": found.channels,
        "mean": list(found.mean),
        "std": list(found.std),
        "classes": None,
    }
    return {"model": {"name": found.name, "kwargs": found.kwargs}, "data": data, "left_out": list(found.dropped)}


def _named(
    checkpoint: Path,
    name: str,
    size: tuple[int, int] | None,
    heads: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model that the user names: any that timm has."""
    if heads is not None:
        raise InputError("--heads goes without --model: a named timm model knows its heads.")
    built, kwargs = timm_from_file(name, checkpoint, f"--model {name}", image_size=size)
    channels = int(kwargs["in_chans"])
    usual_mean, usual_std = declared_statistics(built, channels)
    declared = getattr(built, "pretrained_cfg", {}).get("input_size", (channels, 224, 224))
    data = {
        "image_size": list(size or (int(declared[1]), int(declared[2]))),
        "channels": channels,
        "mean": list(mean or usual_mean),
        "std": list(std or usual_std),
        "classes": None,
    }
    return built, {"model": {"name": name, "kwargs": kwargs}, "data": data, "left_out": []}


def _decoder_facts(decoder: Mapping[str, Tensor], heads: int | None, where: str) -> dict[str, Any]:
    """Size of the decoder for the manifest."""
    if not decoder:
        if heads is not None:
            raise InputError(f"--decoder-heads: {where} holds no decoder, or it is not imported (--format timm).")
        return {}
    width = int(decoder["mask_token"].shape[-1])
    heads = heads if heads is not None else DECODER_HEADS.get(width)
    if heads is not None and width % heads:
        raise InputError(f"--decoder-heads {heads} does not divide the width of the decoder, {width}.")
    depth = len({key.split(".")[1] for key in decoder if key.startswith("decoder_blocks.")})
    return {"decoder": {"dim": width, "depth": depth, "heads": heads}}


def _contract(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: data[key] for key in ("channels", "mean", "std")} | {"image_size": tuple(data["image_size"])}


def _save(state: Mapping[str, Tensor], file: Path) -> None:
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    atomic_save(file, lambda path: safetensors.torch.save_file(tensors, path, metadata={"format": "pt"}))


def _digest(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()
