"""IDX files, the format of MNIST and its successors, and Fashion-MNIST (Xiao, Rasul and Vollgraf 2017) in it.

An IDX file is a magic number (two zero bytes, the type, the number of axes), the axes as big-endian 32-bit numbers, and
then the values in row-major order; it is usually packed with gzip.
"""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clustermim.data.arrays import ArrayStore
from clustermim.data.collection import Collection, clean_labels, reason_of
from clustermim.data.tables import from_hub
from clustermim.errors import InputError

FASHION_MNIST_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/dataset-fashion-mnist"))
"""Where Debian's package `dataset-fashion-mnist` puts its files."""

FASHION_MNIST_HUB = "hf://zalando-datasets/fashion_mnist"
"""Where it is had from otherwise."""

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file, packed with gzip or not.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    array
        Of the shape and type that its header says, in the machine's byte order.

    Raises
    ------
    InputError
        It cannot be read, is no IDX file, or holds more or fewer values than its header says.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as problem:
        raise InputError(f"{path} cannot be read: {reason_of(problem)}.") from None
    kind = np.dtype(_TYPES[content[2]]) if len(content) >= 4 and content[2] in _TYPES else None
    start = 4 + 4 * content[3] if kind is not None else 0
    if kind is None or content[:2] != b"\0\0" or len(content) < start:
        raise InputError(f"{path} is no IDX file: it begins with {content[:4]!r}.")
    shape = tuple(int(side) for side in np.frombuffer(content, ">u4", content[3], 4))
    wanted = start + math.prod(shape) * kind.itemsize
    if len(content) != wanted:
        raise InputError(
            f"{path} is damaged: its header says {shape}, which takes {wanted:,} bytes, and it has {len(content):,}."
        )
    return np.frombuffer(content, kind, offset=start).reshape(shape).astype(kind.newbyteorder("="))


def from_fashion_mnist(folders: Sequence[Path] = FASHION_MNIST_FOLDERS) -> Collection:
    """Fashion-MNIST: 60,000 training and 10,000 test pictures of clothes, 28 × 28, grey, ten classes.

    Parameters
    ----------
    folders
        Where its IDX files may lie; where they lie in none, the hub is asked.

    Raises
    ------
    InputError
        The files are damaged or do not fit each other, or there are none and the hub cannot be reached.
    """
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        try:
            collection = from_hub(FASHION_MNIST_HUB)
        except InputError as error:
            raise InputError(
                f"fashion-mnist is not on this machine, and not to be had from the hub ({error}) "
                f"`apt-get install dataset-fashion-mnist` puts it into {folders[0]}."
            ) from None
        collection.name = "fashion-mnist"
    else:
        collection = _from_folder(folder)
    # A mirrored shoe is a shoe; the garment fills its picture, so that a fifth of it is a piece of cloth.
    collection.flip, collection.crop_scale = True, (0.5, 1.0)
    return collection


def _from_folder(folder: Path) -> Collection:
    images, labels, splits = [], [], []
    for split, names in _FILES.items():
        pictures, numbers = (read_idx(_find(folder, name)) for name in names)
        if pictures.ndim != 3 or numbers.shape != pictures.shape[:1]:
            raise InputError(
                f"The {split} files of {folder} do not fit each other: images {pictures.shape}, labels {numbers.shape}."
            )
        images.append(pictures)
        labels.append(numbers)
        splits.append(np.full(len(pictures), split))
    if images[0].shape[1:] != images[1].shape[1:]:
        raise InputError(
            f"The training images of {folder} are {images[0].shape[1:]} pixels, its test images {images[1].shape[1:]}."
        )
    array = np.concatenate(images)[..., None]
    where = f"The labels in {folder}"
    known, classes = clean_labels(np.concatenate(labels), len(array), where, FASHION_MNIST_CLASSES)
    return Collection(
        "fashion-mnist",
        ArrayStore(array, "fashion-mnist"),
        known,
        classes,
        given_split=np.concatenate(splits),
    )


def _find(folder: Path, name: str) -> Path:
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    raise InputError(f"{folder} holds no {name}.gz: install dataset-fashion-mnist again.")
