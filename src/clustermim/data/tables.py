"""Images in tables: parquet files, the Hugging Face hub and webdataset shards, read by `datasets`.

The table stays memory-mapped on disk; a row is read and decoded when it is asked for.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from clustermim.data import readers
from clustermim.data.collection import Collection, clean_labels, reason_of
from clustermim.data.pixels import BadImage
from clustermim.data.trees import SPLIT_FOLDERS
from clustermim.errors import InputError, nearest

_SPLIT_IN_NAME = re.compile(rf"(?:^|[-_./])({'|'.join(SPLIT_FOLDERS)})(?=[-_./]|$)", re.IGNORECASE)
_IMAGE_NAMES = ("image", "img", "picture", "photo")
_PATH_NAMES = (*_IMAGE_NAMES, "file_name")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "cls")


class TableStore:
    """Rows of one or more Hugging Face datasets with a column of encoded images."""

    def __init__(self, parts: list[Any], column: str, folder: Path, origin: str) -> None:
        # A shuffled or filtered table is a list of rows into another; it is written out once, to be read directly.
        flat = [part if part._indices is None else part.flatten_indices() for part in parts]
        self.parts = [part.select_columns([column]) for part in flat]
        self.column, self.folder, self.origin = column, folder, origin
        self.count = sum(len(part) for part in parts)

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory maps, which each process opens itself."""
        return {key: value for key, value in self.__dict__.items() if key != "chunks"}

    @cached_property
    def chunks(self) -> tuple[list[Any], list[int]]:
        """The pieces of the column, and the row at which each begins."""
        pieces = [piece for part in self.parts for piece in part.data.column(self.column).chunks]
        return pieces, [0, *accumulate(len(piece) for piece in pieces)]

    def load(self, row: int) -> bytes:
        """The encoded bytes of one image, from the table or from the file that it names."""
        pieces, starts = self.chunks
        place = bisect_right(starts, row) - 1
        return encoded_bytes(pieces[place][row - starts[place]].as_py(), self.folder)

    def read(self, row: int) -> np.ndarray:
        """Raw pixels (C, H, W)."""
        return readers.decode(self.load(row))

    def glance(self, row: int) -> None:
        """Look at the first and last bytes."""
        readers.glance(self.load(row))

    def label_of(self, row: int) -> str:
        """The row."""
        return f"row {row}"

    def identify(self, digest: "hashlib._Hash") -> None:
        """Names and sizes of the files, and the number of rows."""
        digest.update(f"{self.origin} {len(self)}".encode())


def encoded_bytes(value: Any, folder: Path) -> bytes:
    """The image in a cell of a table: bytes, a path below `folder`, or a mapping of either under `bytes` and `path`.

    Raises
    ------
    BadImage
        When the cell is empty or its file cannot be read.
    """
    if isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None and value.get("path") else value.get("bytes")
    if not value:
        raise BadImage("an empty cell")
    if isinstance(value, str):
        try:
            return Path(folder, value).read_bytes()
        except OSError as problem:
            raise BadImage(f"{value}: {problem.strerror}") from None
    return bytes(value)


def from_parquet(path: Path) -> Collection:
    """A parquet file, or a folder of them whose names may tell train from test.

    Raises
    ------
    InputError
        When a file cannot be read, or has no column of images.
    """
    by_split = files_by_split(path, ".parquet")
    with datasets_quietly(path) as datasets:
        parts = dict(datasets.load_dataset("parquet", data_files={k: list(map(str, v)) for k, v in by_split.items()}))
    files = sorted(file for part in by_split.values() for file in part)
    origin = " ".join(f"{file.name} {file.stat().st_size}" for file in files)
    return from_tables(parts, str(path), path if path.is_dir() else path.parent, origin)


def files_by_split(path: Path, suffix: str) -> dict[str, list[Path]]:
    """A file, or the files of a folder that end in `suffix`, in order, by the split that their names tell."""
    files = sorted(file for file in path.rglob(f"*{suffix}") if file.is_file()) if path.is_dir() else [path]
    found: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT_IN_NAME.search(file.relative_to(path).as_posix() if path.is_dir() else file.name)
        found.setdefault(SPLIT_FOLDERS[match.group(1).lower()] if match else "train", []).append(file)
    return found


def from_shards(path: Path) -> Collection:
    """A webdataset shard, or a folder of them (`.tar`)."""
    files = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
    with datasets_quietly(path) as datasets:
        parts = dict(datasets.load_dataset("webdataset", data_files={"train": [str(file) for file in files]}))
    origin = " ".join(f"{file.name} {file.stat().st_size}" for file in files)
    return from_tables(parts, str(path), path.parent, origin)


def from_hub(address: str) -> Collection:
    """A dataset of the Hugging Face hub: `hf://owner/name?config=..&split=..`."""
    parsed = urlsplit(address)
    query = hub_query(address, parsed.query)
    name = f"{parsed.netloc}{parsed.path}".strip("/")
    with datasets_quietly(address) as datasets:
        loaded = datasets.load_dataset(name, query.get("config"), split=query.get("split"))
    parts = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    return from_tables(parts, address, Path(), " ".join(str(part._fingerprint) for part in parts.values()))


def hub_query(address: str, query: str) -> dict[str, str]:
    """What stands behind the `?` of an address: `config` and `split`, each or none of them.

    Raises
    ------
    InputError
        For another key.
    """
    found = {key: values[-1] for key, values in parse_qs(query).items()}
    for key in found:
        if key not in ("config", "split"):
            raise InputError(f"{address}: unknown key {key!r}.{nearest(key, ('config', 'split'))}")
    return found


def from_tables(parts: Mapping[str, Any], where: str, folder: Path, origin: str) -> Collection:
    """Hugging Face datasets by split.

    Raises
    ------
    InputError
        When there is no column of images, or no rows.
    """
    tables = {SPLIT_FOLDERS.get(str(split).lower(), "train"): table for split, table in parts.items() if len(table)}
    if not tables:
        raise InputError(f"{where} holds no rows.")
    first = next(iter(tables.values()))
    column = image_column(first.features, first.data.schema, where)
    for table in tables.values():
        if column not in table.column_names:
            raise InputError(f"{where}: a split has no image column {column!r}, but {', '.join(table.column_names)}.")
    store = TableStore(list(tables.values()), column, folder, origin)
    collection = Collection(where, store, check="glance", unlabelled_because="it has no column 'label'")
    if len(tables) > 1:
        collection.given_split = np.concatenate([np.full(len(table), split) for split, table in tables.items()])
    label = next((found for table in tables.values() if (found := label_column(table.features)) is not None), None)
    if label is not None:
        feature = next(table.features[label] for table in tables.values() if label in table.column_names)
        values = _column(tables, label, None)
        collection.labels, collection.classes = clean_labels(
            values, len(store), f"Column {label!r} of {where}", getattr(feature, "names", None)
        )
    collection.group_field = _group_reader(tables, where)
    return collection


def _group_reader(tables: Mapping[str, Any], where: str) -> Callable[[str], np.ndarray]:
    def read(field: str) -> np.ndarray:
        for table in tables.values():
            if field not in table.column_names:
                raise InputError(f"{where} has no column {field!r} to group by.{nearest(field, table.column_names)}")
        return np.array([str(value) for value in _column(tables, field, None)])

    return read


def _column(tables: Mapping[str, Any], name: str, absent: Any) -> np.ndarray:
    """One column of all tables, `absent` where a table lacks it."""
    values: list[Any] = []
    for table in tables.values():
        values += list(table.select_columns([name])[:][name]) if name in table.column_names else [absent] * len(table)
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def image_column(features: Mapping[str, Any], schema: Any, where: str) -> str:
    """The column of images: an Image feature, else encoded bytes, or text, under a usual name.

    Parameters
    ----------
    features
        Of Hugging Face, by column.
    schema
        Of Arrow.
    where
        What to call the table in a message.

    Raises
    ------
    InputError
        When there is no such column.
    """
    import pyarrow

    for name, feature in features.items():
        if type(feature).__name__ == "Image":
            return str(name)
    encoded, texts = [], []
    for field in schema:
        kind = field.type
        if pyarrow.types.is_struct(kind) and "bytes" in [part.name for part in kind]:
            return str(field.name)
        if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
            encoded.append(field.name)
        if (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)) and field.name in _PATH_NAMES:
            texts.append(field.name)
    named = [name for name in encoded if name.lower() in _IMAGE_NAMES] or (encoded if len(encoded) == 1 else texts)
    if not named:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise InputError(
            f"{where} has no column of images: one of encoded bytes is needed, best called 'image'. It has {columns}."
        )
    return str(named[0])


def label_column(features: Mapping[str, Any]) -> str | None:
    """The column of labels: one of the usual names, else the first with class names."""
    for name in _LABEL_NAMES:
        if name in features and type(features[name]).__name__ in ("ClassLabel", "Value"):
            return name
    return next((name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"), None)


@contextmanager
def datasets_quietly(where: Path | str) -> Iterator[Any]:
    """The `datasets` library, quiet, its many kinds of errors as an `InputError`."""
    import datasets

    shown = not datasets.utils.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.utils.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield datasets
    except Exception as problem:
        cause = problem.__cause__ if isinstance(problem.__cause__, Exception) else problem
        raise InputError(f"{where} cannot be read: {reason_of(cause)}.") from None
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.utils.enable_progress_bars()
