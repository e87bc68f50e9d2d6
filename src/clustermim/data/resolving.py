"""Finding out what a source is: a name, a path of some kind, an array, a tensor, a pair or a Dataset."""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from clustermim.data.arrays import from_array, from_dataset, from_digits, from_npz
from clustermim.data.collection import Collection
from clustermim.data.idx import from_fashion_mnist
from clustermim.data.options import DataOptions
from clustermim.data.readers import IMAGE_SUFFIXES
from clustermim.data.tables import from_hub, from_parquet, from_shards, from_tables
from clustermim.data.trees import from_folder, from_image_file, from_zip
from clustermim.errors import InputError, nearest

# Sized: a Hugging Face dataset is no torch Dataset, and is not imported to say so.
DataLike: TypeAlias = "str | Path | np.ndarray | Tensor | tuple[Any, ...] | Dataset[Any] | Sized"
Split: TypeAlias = Literal["train", "test", "all"]

STREAM_PREFIXES = ("wds:", "hf-stream:")
SOURCE_NAMES = ("digits", "fashion-mnist")
_SPLITS: dict[str, Split] = {"train": "train", "test": "test", "all": "all"}


def collect(data: DataLike, options: DataOptions) -> tuple[Collection, Split | None]:
    """Find out what `data` is, and list its images; also the split that a `#` behind a name or path asks for.

    Raises
    ------
    InputError
        When there is nothing of that name, or nothing in it that can be used.
    """
    if isinstance(data, (str, Path)):
        return _collect_named(str(data), options)
    if isinstance(data, tuple):
        if len(data) != 2:
            raise InputError(f"A pair (images, labels) is needed, not {len(data)} things.")
        return from_array(data[0], data[1], channels=options.channels), None
    if isinstance(data, (np.ndarray, Tensor)):
        return from_array(data, channels=options.channels), None
    if type(data).__module__.split(".")[0] == "datasets":
        if not isinstance(data, (Mapping, Sized)):
            raise InputError(
                f"A Hugging Face {type(data).__name__} does not say how many images it has. Name what it was made of: "
                f"hf-stream:FOLDER or hf-stream:owner/name?split=train (pretrain, tokenizer fit), or load it without "
                f"streaming."
            )
        parts: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {"train": data}
        prints = " ".join(str(part._fingerprint) for part in parts.values())
        return from_tables(parts, type(data).__name__, Path(), prints), None
    if isinstance(data, Dataset):
        return from_dataset(data), None
    raise InputError(
        f"Images cannot be read from a {type(data).__name__}: give a name, a path, an array (n, H, W[, C]), "
        f"a pair (images, labels) or a map-style Dataset."
    )


def _collect_named(text: str, options: DataOptions) -> tuple[Collection, Split | None]:
    if text.startswith(STREAM_PREFIXES):
        raise InputError(
            f"{text} is read from the front, which is enough for `pretrain` and for K-means in `tokenizer fit`; here "
            f"images are taken in any order. Leave the prefix out: a .tar or parquet file, or a folder of them, is "
            f"indexed once when it is opened (hf://owner/name: downloaded)."
        )
    name, suffix = text, None
    if "#" in text and not Path(text).exists():
        name, _, ending = text.rpartition("#")
        suffix = _SPLITS.get(ending)
        if suffix is None:
            raise InputError(f"{text} asks for a split {ending!r}, which does not exist.{nearest(ending, _SPLITS)}")
    if name == "digits":
        return from_digits(), suffix
    if name == "fashion-mnist":
        return from_fashion_mnist(), suffix
    if name.startswith("hf://"):
        return from_hub(name), suffix
    path = Path(name).expanduser()
    if not path.exists():
        raise _nothing_there(name, path)
    return _collect_path(path, options), suffix


def _collect_path(path: Path, options: DataOptions) -> Collection:
    """Tell a path's kind by what it is and ends in."""
    if path.is_dir():
        for suffix, read in ((".parquet", from_parquet), (".tar", from_shards)):
            if next(path.rglob(f"*{suffix}"), None) is not None:
                return read(path)
        return from_folder(path, options)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return from_npz(path, options.channels)
    if suffix == ".zip":
        return from_zip(path, options)
    if suffix == ".parquet":
        return from_parquet(path)
    if suffix == ".tar":
        return from_shards(path)
    if suffix in IMAGE_SUFFIXES:
        return from_image_file(path)
    raise InputError(f"{path} is of no kind that can be read: a folder, a .zip, .parquet, .npz, .tar or image file is.")


def _nothing_there(name: str, path: Path) -> InputError:
    """A path or name that does not exist, with the nearest that does."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    missing = path.relative_to(parent).parts[0] if parent != path else name
    siblings = [entry.name for entry in sorted(parent.iterdir()) if not entry.name.startswith(".")]
    choices = [*SOURCE_NAMES, *siblings] if path.parent == Path() else siblings
    where = "" if path.parent == Path() else f" in {parent}"
    kind = "is neither a known source nor a file or folder here" if path.parent == Path() else "does not exist"
    return InputError(f"--data {name} {kind}: there is no {missing!r}{where}.{nearest(missing, choices)}")
