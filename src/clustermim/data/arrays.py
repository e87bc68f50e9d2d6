"""Images that are already in memory: scikit-learn's digits, arrays, tensors, `.npz` files, and Datasets in Python."""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clustermim.data.collection import Collection, clean_labels, reason_of
from clustermim.data.pixels import BadImage
from clustermim.data.readers import from_pil
from clustermim.errors import InputError, nearest

_CHUNK = 4096  # images looked at together when an array is checked


class ArrayStore:
    """Images as one array (n, H, W, C)."""

    def __init__(self, images: np.ndarray, name: str) -> None:
        self.images, self.name = images, name

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> np.ndarray:
        """Raw pixels (C, H, W)."""
        return np.ascontiguousarray(self.images[row].transpose(2, 0, 1))

    def block(self, rows: np.ndarray) -> np.ndarray:
        """Raw pixels (n, C, H, W) of many images at once."""
        return np.ascontiguousarray(self.images[rows].transpose(0, 3, 1, 2))

    def glance(self, row: int) -> None:
        """Nothing to be seen without reading."""

    def label_of(self, row: int) -> str:
        """The row."""
        return f"image {row}"

    def identify(self, digest: "hashlib._Hash") -> None:
        """All pixels."""
        digest.update(f"{self.images.shape} {self.images.dtype}".encode())
        for start in range(0, len(self.images), _CHUNK):
            digest.update(np.ascontiguousarray(self.images[start : start + _CHUNK]).tobytes())


def from_digits() -> Collection:
    """scikit-learn's 1,797 scanned digits, 8 by 8, grey (Alpaydin and Kaynak, 1998)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (np.asarray(digits.images, dtype=np.float32) / 16)[..., None]
    labels, classes = clean_labels(digits.target, len(images), "digits")
    # A mirrored 2 is no digit, and a small crop of an 8x8 scan is a few strokes.
    return Collection("digits", ArrayStore(images, "digits"), labels, classes, flip=False, crop_scale=(0.8, 1.0))


def from_array(images: Any, labels: Any = None, *, name: str = "array", channels: int | None = None) -> Collection:
    """Images as an array (n, H, W) or (n, H, W, C), or as a tensor (n, H, W) or (n, C, H, W).

    Raises
    ------
    InputError
        For another shape or type, or no images.
    """
    if isinstance(images, Tensor):
        tensor = images.detach().cpu()
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        array = tensor.numpy()
        array = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
    else:
        array = np.asarray(images)
        if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] > 4 and array.shape[3] != channels:
            raise InputError(
                f"{name} has shape {array.shape}, which looks like (n, C, H, W): arrays are (n, H, W) or "
                f"(n, H, W, C). Transpose it with x.transpose(0, 2, 3, 1); tensors are (n, C, H, W) as they come."
            )
    if array.ndim not in (3, 4):
        raise InputError(f"{name} has shape {array.shape}: images are (n, H, W) or (n, H, W, C).")
    if array.size == 0:
        raise InputError(f"{name} has shape {array.shape}: it holds no images.")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype.kind not in "uif":
        raise InputError(f"{name} holds {array.dtype} values: pixels are uint8, uint16 or float.")
    array = array[..., None] if array.ndim == 3 else array
    # Floats may be NaN or out of range anywhere, so all of them are looked at.
    check: Literal["sample", "decode"] = "sample" if array.dtype in (np.uint8, np.uint16) else "decode"
    collection = Collection(name, ArrayStore(array, name), check=check)
    if labels is not None:
        where = f"The labels of {name}"
        collection.labels, collection.classes = clean_labels(_to_numpy(labels), len(array), where)
    return collection


def from_npz(path: Path, channels: int | None) -> Collection:
    """An `.npz` file with `x` (n, H, W[, C]), optionally `y` (n), and any arrays of n values to group by.

    Raises
    ------
    InputError
        When the file cannot be read, or holds no `x`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as problem:
        raise InputError(f"{path} cannot be read as an .npz file: {reason_of(problem)}.") from None
    if "x" not in arrays:
        found = ", ".join(f"{key} {value.shape}" for key, value in arrays.items()) or "nothing"
        raise InputError(
            f"{path} has no array 'x' of images (n, H, W[, C]); it holds {found}. Save it again with "
            f"np.savez(path, x=images, y=labels)."
        )
    collection = from_array(arrays["x"], arrays.get("y"), name=str(path), channels=channels)
    collection.unlabelled_because = "the file has no array 'y'"
    fields = {key: value for key, value in arrays.items() if key not in ("x", "y")}
    collection.group_field = lambda field: _npz_group(path, fields, field, len(collection.store))
    return collection


def _npz_group(path: Path, fields: Mapping[str, np.ndarray], field: str, count: int) -> np.ndarray:
    if field not in fields:
        raise InputError(f"{path} has no array {field!r} to group by.{nearest(field, fields)}")
    if fields[field].shape not in ((count,), (count, 1)):
        raise InputError(
            f"Array {field!r} of {path} has shape {fields[field].shape}: --group needs one value for "
            f"each of the {count} images."
        )
    return fields[field].reshape(count)


class DatasetStore:
    """A map-style Dataset in Python, whose items are images, (image, label) or {'image': ..., 'label': ...}."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, row: int) -> np.ndarray:
        """Raw pixels (C, H, W) of a Pillow image, a tensor (C, H, W) or an array (H, W[, C])."""
        try:
            image = item_parts(self.dataset[row])[0]
        except Exception as problem:  # a Dataset of the user's may raise anything
            raise BadImage(f"{type(problem).__name__}: {reason_of(problem)}") from None
        if isinstance(image, Image.Image):
            return from_pil(image)
        if isinstance(image, Tensor):
            array = (
                image.detach().cpu().float().numpy() if image.dtype == torch.bfloat16 else image.detach().cpu().numpy()
            )
            array = array[None] if array.ndim == 2 else array
        else:
            array = np.asarray(image)
            array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1) if array.ndim == 3 else array
        if array.ndim != 3 or array.dtype.kind not in "buif" or array.size == 0:
            raise BadImage(f"{type(image).__name__} of shape {array.shape} and type {array.dtype} is no image")
        return array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array

    def glance(self, row: int) -> None:
        """Nothing to be seen without reading."""

    def label_of(self, row: int) -> str:
        """The row."""
        return f"item {row}"

    def identify(self, digest: "hashlib._Hash") -> None:
        """The number of images and the pixels of up to 200 of them, evenly spread."""
        digest.update(f"{type(self.dataset).__name__} {len(self)}".encode())
        for row in range(0, len(self), max(1, len(self) // 200)):
            digest.update(self.read(row).tobytes())


def item_parts(item: Any) -> tuple[Any, Any]:
    """(image, label or None) of an item of a Dataset."""
    if isinstance(item, Mapping):
        image = next((item[key] for key in ("image", "img", "x", "pixel_values") if key in item), None)
        label = next((item[key] for key in ("label", "labels", "y") if key in item), None)
        return image, label
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def from_dataset(dataset: "Dataset[Any]") -> Collection:
    """A map-style Dataset; labels come from its `targets` or `labels`, else from reading every item once.

    Items should not be augmented already: views are made here.

    Raises
    ------
    InputError
        For a Dataset without a length, or an empty one.
    """
    name = type(dataset).__name__
    count = len(dataset) if hasattr(dataset, "__len__") else None
    if not count:
        state = "is empty" if count == 0 else "has no length: only map-style Datasets can be used"
        raise InputError(f"The dataset {name} {state}.")
    values = next(
        (getattr(dataset, key) for key in ("targets", "labels") if getattr(dataset, key, None) is not None), None
    )
    if values is None and item_parts(dataset[0])[1] is not None:
        values = [item_parts(dataset[row])[1] for row in range(count)]
        values = [value.item() if isinstance(value, (Tensor, np.generic)) else value for value in values]
    names = getattr(dataset, "classes", None)
    labels = classes = None
    if values is not None:
        labels, classes = clean_labels(_to_numpy(values), count, f"The labels of {name}", names)
    return Collection(name, DatasetStore(dataset), labels, classes)


def _to_numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
