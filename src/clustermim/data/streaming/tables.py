"""Tables that Hugging Face `datasets` streams: parquet, arrow and JSON files of this machine, parquet of the hub.

A file is a shard. `datasets` opens it at a row and hands it over a block of rows at a time, as Arrow, so that rows
which are passed over are never taken apart.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clustermim.data.collection import reason_of
from clustermim.data.pixels import BadImage
from clustermim.data.streaming.counting import Count, counted
from clustermim.data.streaming.remote import open_remote
from clustermim.data.streaming.shards import Sample, ended_early, unreadable
from clustermim.data.tables import (
    datasets_quietly,
    encoded_bytes,
    files_by_split,
    hub_query,
    image_column,
    label_column,
)
from clustermim.errors import InputError, nearest

_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}
_BLOCK = 64  # rows handed over at once
_FOOTERS = 16  # files of the hub looked at together


class TableShards:
    """The files of a streamed data set; see `shards.Shards`.

    Parameters
    ----------
    name
        What the stream was opened as.
    dataset
        A Hugging Face IterableDataset with as many shards as there are files.
    files
        Names or addresses of the files, in the order of the shards.
    counts
        Of each file.
    folder
        Where images lie that a table names instead of holding them.
    local
        Whether the files lie on this machine.
    """

    def __init__(
        self, name: str, dataset: Any, files: Sequence[str], counts: Sequence[Count], folder: Path, local: bool
    ) -> None:
        self.name, self.folder, self.local = name, folder, local
        self.names = [file.rsplit("/", 1)[-1] for file in files]
        self.counts = np.array([number for number, _ in counts], dtype=np.int64)
        self.problems = [(name, why) for name, (_, why) in zip(self.names, counts, strict=True) if why is not None]
        if dataset.num_shards != len(files):
            raise InputError(
                f"{name}: the {len(files)} files come as {dataset.num_shards} parts, so the place of an image cannot "
                f"be told."
            )
        with datasets_quietly(name):
            arrow = dataset.with_format("arrow")
            first = next(iter(arrow.iter(batch_size=1)), None)
        if first is None:
            raise InputError(f"{name} holds no rows.")
        features = dataset.features or {}
        self.column = image_column(features, first.schema, name)
        self.label = label_column(features)
        if self.label is not None and first.schema.field(self.label).type not in _whole_numbers():
            self.label = None
        columns = [self.column] if self.label is None else [self.column, self.label]
        self._parts = arrow.select_columns(columns)

    def read(self, shard: int, rows: Iterable[int]) -> Iterator[Sample]:
        """See `Shards.read`."""
        wanted = iter(rows)
        row = next(wanted, None)
        if row is None:
            return
        number = row
        part = self._parts.shard(len(self.names), shard)
        try:
            # Not by iterating over it: in a worker process that would share the rows out among the workers.
            for table in (part.skip(row) if row else part).iter(batch_size=_BLOCK):
                images = table.column(self.column)
                labels = None if self.label is None else table.column(self.label)
                while row is not None and row < number + len(table):
                    given = None if labels is None else labels[row - number].as_py()
                    name = f"{self.names[shard]}: row {row}"
                    yield Sample(row, name, self._content(images[row - number].as_py()), _known(given))
                    row = next(wanted, None)
                number += len(table)
                if row is None:
                    return
        except Exception as problem:  # of the file system, of pyarrow, of the network
            raise unreadable(f"{self.names[shard]} of {self.name}", reason_of(problem)) from None
        raise ended_early(f"{self.names[shard]} of {self.name}", number, row)

    def _content(self, cell: Any) -> bytes:
        try:
            return encoded_bytes(cell, self.folder)
        except BadImage:
            return b""  # which no decoder takes for an image

    def identify(self, digest: "hashlib._Hash") -> None:
        """Names and rows of the files."""
        for name, count in zip(self.names, self.counts.tolist(), strict=True):
            digest.update(f"{name}\0{count}\0".encode(errors="surrogateescape"))


def open_tables(address: str) -> tuple[TableShards, str]:
    """The files behind `hf-stream:`, and the split that they are.

    Parameters
    ----------
    address
        A file or folder (parquet, arrow or JSON), or `owner/name` of the hub; behind `?`, `config` and `split`.

    Raises
    ------
    InputError
        When there is nothing of the kind, or its rows cannot be counted.
    """
    name = f"hf-stream:{address}"
    place, _, query = address.partition("?")
    asked = hub_query(name, query)
    path = Path(place).expanduser()
    if path.exists():
        return _open_local(name, path, asked)
    return _open_hub(name, place.strip("/"), asked)


def _open_local(name: str, path: Path, asked: dict[str, str]) -> tuple[TableShards, str]:
    if "config" in asked:
        raise InputError(f"{name}: files of this machine have no config.")
    suffix = next((suffix for suffix in _KINDS if files_by_split(path, suffix)), None) if path.is_dir() else path.suffix
    if suffix not in _KINDS:
        raise InputError(f"{name}: a folder or file of {', '.join(_KINDS)} can be streamed, and {path} is none.")
    by_split = files_by_split(path, suffix)
    split = _choose(name, asked.get("split", "train"), by_split)
    files = [file for file in by_split[split] if file.name not in ("dataset_info.json", "state.json")]
    with datasets_quietly(path) as datasets:
        data = datasets.load_dataset(_KINDS[suffix], data_files=list(map(str, files)), split="train", streaming=True)

    def count(file: Path) -> Count:
        with datasets_quietly(file):
            if suffix == ".parquet":
                return _footer(file), None
            part = data.shard(len(files), files.index(file)).with_format("arrow")
            return sum(len(table) for table in part.iter(batch_size=1000)), None

    folder = path if path.is_dir() else path.parent
    return TableShards(name, data, list(map(str, files)), counted(files, "rows", count), folder, True), split


def _open_hub(name: str, repository: str, asked: dict[str, str]) -> tuple[TableShards, str]:
    if repository.count("/") > 1 or ":" in repository:
        raise InputError(
            f"--data {name} is neither a file or folder here nor a data set of the hub, which is written "
            f"hf-stream:owner/name?split=train."
        )
    with datasets_quietly(name) as datasets:
        builder = datasets.load_dataset_builder(repository, asked.get("config"))
        by_split = {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
    split = _choose(name, asked.get("split", "train"), by_split)
    files = by_split[split]
    if not all(file.endswith(".parquet") for file in files):
        raise InputError(
            f"{name} does not lie in parquet files, so how many images each file has cannot be told without reading "
            f"all of it. Take tar files as wds:hf://datasets/{repository}/..., or leave out the streaming: "
            f"hf://{repository}."
        )
    with datasets_quietly(name):
        data = builder.as_streaming_dataset(split=split)
        with ThreadPoolExecutor(_FOOTERS) as pool:
            rows = list(pool.map(_remote_footer, files))
    return TableShards(name, data, files, [(number, None) for number in rows], Path(), False), split


def _choose(name: str, split: str, by_split: dict[str, Any]) -> str:
    if split not in by_split:
        raise InputError(f"{name} has no split {split!r}.{nearest(split, by_split)}")
    return split


def _footer(file: Any) -> int:
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(file).num_rows)


def _remote_footer(address: str) -> int:
    with open_remote(address) as file:
        return _footer(file)


def _whole_numbers() -> list[Any]:
    import pyarrow

    return [getattr(pyarrow, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)]


def _known(label: Any) -> int | None:
    return None if label is None or label < 0 else int(label)
