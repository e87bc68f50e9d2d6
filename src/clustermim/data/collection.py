"""What every kind of source becomes before it is split: a store of raw images, and what is known about each of them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from clustermim.data.pixels import BadImage
from clustermim.errors import InputError


@runtime_checkable
class Store(Protocol):
    """Where raw images lie. Safe to read from several threads, and picklable for worker processes."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def read(self, row: int) -> np.ndarray:
        """Raw pixels (C, H, W) of one image; `BadImage` when it cannot be read."""
        ...

    def glance(self, row: int) -> None:
        """`BadImage` when an image is visibly broken, found without decoding it."""
        ...

    def label_of(self, row: int) -> str:
        """What to call this image in a message: its file name or row."""
        ...

    def identify(self, digest: "hashlib._Hash") -> None:
        """Feed what identifies the images (contents, or names and sizes) to a hash."""
        ...


@dataclass
class Collection:
    """All images of a source, before splitting."""

    name: str
    """What to call the source in messages and tables."""
    store: Store
    """Raw images."""
    labels: np.ndarray | None = None
    """int64, one for each image, -1 = unknown; or None."""
    classes: tuple[str, ...] | None = None
    """Name of each label."""
    given_split: np.ndarray | None = None
    """'train', 'test' or 'val' for each image, where the source itself brings splits."""
    group_field: Callable[[str], np.ndarray] | None = None
    """Values of a grouping field, one for each image; InputError when there is no such field."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Files left out already when listing, with the reason."""
    check: Literal["sample", "glance", "decode"] = "sample"
    """What is looked at when the source is opened: a sample decoded, besides it every image glanced at, or every image
    decoded."""
    flip: bool = True
    """Default of --flip."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Default of --crop-scale."""
    state: Callable[[], str | None] | None = None
    """Fingerprint of the files: the same again where none has changed; None, or a function giving None: unknown."""
    unlabelled_because: str = "it brings no labels"
    """Ends a message about missing labels."""


def clean_labels(
    values: Any, count: int, where: str, names: Sequence[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 in [0, classes), -1 where unknown, and the class names.

    Parameters
    ----------
    values
        Integers (negative = unknown), strings or None, one for each image.
    count
        Number of images.
    where
        What to call the labels in a message.
    names
        Class names by integer value; classes without an image are dropped.

    Raises
    ------
    InputError
        For a wrong number of labels, several labels an image, or labels that are neither whole numbers nor text.
    """
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise InputError(f"{where} has shape {array.shape}: one label for each image is needed, as a list of {count}.")
    if len(array) != count:
        raise InputError(f"{where} has {len(array)} labels for {count} images: give one label for each image.")
    if array.dtype.kind == "O":
        known = np.array([value is not None for value in array])
        text = np.array([str(value) if value is not None else "" for value in array])
        if known.any() and all(isinstance(value, (int, np.integer)) for value in array[known]):
            array = np.array([int(value) if value is not None else -1 for value in array])
        else:
            found, inverse = np.unique(text[known], return_inverse=True)
            labels = np.full(count, -1, dtype=np.int64)
            labels[known] = inverse
            return labels, tuple(str(name) for name in found)
    if array.dtype.kind in "US":
        found, inverse = np.unique(array, return_inverse=True)
        return inverse.astype(np.int64), tuple(
            name.decode() if isinstance(name, bytes) else str(name) for name in found
        )
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.round(array)).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "iub":
        raise InputError(f"{where} holds {array.dtype} values: labels must be whole numbers or text.")
    array = array.astype(np.int64)
    known = array >= 0
    found, inverse = np.unique(array[known], return_inverse=True)
    labels = np.full(count, -1, dtype=np.int64)
    labels[known] = inverse
    if names is not None and len(found) and int(found.max()) < len(names):
        return labels, tuple(str(names[int(value)]) for value in found)
    return labels, tuple(str(value) for value in found)


def reason_of(problem: Exception) -> str:
    """A short, one-line reason for a reader's exception."""
    if isinstance(problem, BadImage):
        return str(problem)
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 120 else text[:117] + "..."
