"""`clustermim embed`: the features of every image of a source, in one file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from clustermim.data.loaders import make_loader
from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.sources import ImageSource, open_source
from clustermim.errors import InputError
from clustermim.evaluation.cache import FeatureCache, extract, fingerprint
from clustermim.evaluation.evaluating import view_for
from clustermim.evaluation.floors import open_any
from clustermim.runs import atomic_save
from clustermim.training.launch import Device, resolve_device
from clustermim.verbs.job_progress import job_bar

_SUFFIXES = (".npz", ".parquet")


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What was written."""

    out: Path
    encoder: str
    data: str
    images: int
    dims: dict[str, int]
    """Width of each kind of features."""
    fingerprint: str
    """Of the encoder's weights and settings."""

    def rows(self) -> list[dict[str, Any]]:
        """One flat record."""
        facts = {"out": str(self.out), "encoder": self.encoder, "data": self.data, "images": self.images}
        return [facts | {f"{name}_dim": dim for name, dim in self.dims.items()} | {"fingerprint": self.fingerprint}]

    def __rich__(self) -> Table:
        """The record as names and values."""
        table = Table(show_header=False)
        for key, value in self.rows()[0].items():
            table.add_row(key.replace("_", " "), str(value))
        return table


def embed(
    encoder: Annotated[Any, Parameter()],
    data: Annotated[Any, Parameter()] = "digits",
    *,
    out: Path,
    cache: Path | None = None,
    batch_size: int = 256,
    device: Device = "auto",
    workers: int | None = None,
    options: Annotated[DataOptions, Parameter(name="*")] = DEFAULTS,
) -> EmbedResult:
    """Write the features of every image of a source to one file.

    OUT.npz holds `global` (images, D), the class token or the model's own global vector, and `mean` (images, D), the
    mean of the patches, as far as the encoder has them; `index` (each image's place in the source), `labels` and
    `groups` where there are any, `classes`, `fingerprint` (of the encoder) and `data_fingerprint`. OUT.parquet has a
    row an image with `global` and `mean` as lists.

    Parameters
    ----------
    encoder
        A run directory, timm:NAME[@FILE], or a floor: raw-pixels, random:MODEL, bag-of-tokens:DIR. In Python also a
        module.
    data
        Images, labelled or not: the train split, unless #test or #all says otherwise.
    out
        A file that ends in .npz or .parquet.
    cache
        Keep features in this folder and take them from there the next time.
    batch_size
        Images at a time.
    device
        cpu, cuda or mps; auto takes the best there is.
    workers
        Processes that read images; default: as the source needs.
    options
        How the images are read.

    Returns
    -------
    EmbedResult
        Where the features are, and how wide.

    Raises
    ------
    InputError
        The encoder or the data cannot be used, or there is something at `out` already.
    """
    out = Path(out)
    if out.suffix not in _SUFFIXES:
        raise InputError(f"--out {out} must end in {' or '.join(_SUFFIXES)}.")
    if out.exists():
        raise InputError(f"--out {out} is there already; nothing was touched. Choose another name, or remove it first.")
    where = resolve_device(device)
    source = open_source(data, options)
    opened = open_any(encoder, source.view)
    view = view_for(opened, source.view)
    if message := source.skipped_message():
        Console(stderr=True).print(message, markup=False, highlight=False)
    loader = make_loader(source, view, batch_size=batch_size, train=False, device=where, workers=workers)
    mark = fingerprint(opened)
    with job_bar(1, show=True) as told:
        vectors = extract(
            opened.to(where),
            loader,
            cache=None if cache is None else FeatureCache(cache),
            data_fingerprint=source.fingerprint(),
            progress=told(0),
        )
    # One of them is the encoder's global vector, whatever floors call theirs.
    named = {"mean" if pool == "mean" else "global": block.numpy() for (_, pool), block in vectors.items()}
    content = named | _of_images(source) | {"fingerprint": np.array(mark)}
    content["data_fingerprint"] = np.array(source.fingerprint())
    atomic_save(out, _saver(content, len(source)))
    return EmbedResult(
        out=out,
        encoder=opened.name,
        data=source.name,
        images=len(source),
        dims={name: block.shape[1] for name, block in named.items()},
        fingerprint=mark,
    )


def _of_images(source: ImageSource) -> dict[str, np.ndarray]:
    """Index, and labels, groups and class names where the source has them."""
    found = {"index": np.arange(len(source)), "labels": source.labels, "groups": source.groups}
    classes = None if source.classes is None else np.array(source.classes)
    return {key: np.asarray(value) for key, value in (found | {"classes": classes}).items() if value is not None}


def _saver(content: dict[str, np.ndarray], images: int) -> Callable[[Path], None]:
    def save(file: Path) -> None:
        if file.suffix == ".npz":
            np.savez(file, allow_pickle=False, **content)
            return
        import pyarrow
        import pyarrow.parquet

        columns, facts = {}, {}
        for key, value in content.items():
            if value.shape[:1] == (images,) and key != "classes":
                columns[key] = pyarrow.array(list(value) if value.ndim > 1 else value)
            else:
                facts[key] = str(value.tolist())
        pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(facts), file)

    return save
