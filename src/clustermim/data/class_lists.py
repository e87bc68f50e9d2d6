"""Several classes an image, from a file that names them: JSON (COCO's too), CSV (OpenImages' too) or parquet."""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool

from clustermim.data.readers import IMAGE_SUFFIXES
from clustermim.data.sources import ImageSource
from clustermim.errors import InputError

IMAGE_COLUMNS = ("path", "image", "file", "file_name", "filename", "image_id", "imageid")
CLASS_COLUMNS = ("classes", "class", "labels", "label", "labelname", "category", "categories")
_SUFFIXES = (".json", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class ClassLists:
    """Which classes the images of a source belong to."""

    members: Bool[np.ndarray, "images classes"]
    """A row for each image of the source; an image that the file names without a class has none."""
    names: tuple[str, ...]
    """Name of each class, sorted; only classes that occur."""


def read_class_lists(file: str | Path | Mapping[str, Iterable[Any]], source: ImageSource) -> ClassLists:
    """The classes of every image of a source.

    Parameters
    ----------
    file
        JSON: `{"train/a/001.jpg": ["cat", "sofa"], ...}`, or COCO's annotations. CSV with a column of images and one of
        classes, a line for each pair (or several classes in a cell with `;` between); where it has OpenImages'
        `Confidence`, lines of 0 say that a class is not there. Parquet of the same columns; a cell may hold a list. In
        Python also a mapping. Images are called as the source lists them, with or without the ending; where no name of
        the file has a folder, by the name of the image file alone.
    source
        Images.

    Raises
    ------
    InputError
        Nothing there, not such a file, or an image that it does not name: the first is told.
    """
    if isinstance(file, Mapping):
        told, given = "The mapping of classes", _from_mapping(file, "The mapping of classes")
    else:
        told, given = f"--multi-label {file}", _read(Path(file))
    flat = not any("/" in key for key in given)
    labels = [source.collection.store.label_of(int(row)) for row in source.rows]
    keys = [_bare(label) for label in labels]
    if flat and not set(keys) <= given.keys():
        keys = [PurePosixPath(key).name for key in keys]
        if len(set(keys)) < len(keys):
            raise InputError(
                f"{told} names images without their folders, but {source.name} has several images of one name. Name "
                f"them as {labels[0]!r}."
            )
    missing = [label for label, key in zip(labels, keys, strict=True) if key not in given]
    if missing:
        raise InputError(
            f"{told} does not name {len(missing)} of the {len(labels)} images of {source.name} ({source.split}): the "
            f"first is {missing[0]}. Name every image, with an empty list where it belongs to no class."
        )
    names = tuple(sorted({name for key in keys for name in given[key]}))
    place = {name: number for number, name in enumerate(names)}
    members = np.zeros((len(keys), len(names)), dtype=bool)
    for row, key in enumerate(keys):
        members[row, [place[name] for name in given[key]]] = True
    return ClassLists(members=members, names=names)


def _read(file: Path) -> dict[str, set[str]]:
    if not file.is_file():
        raise InputError(f"--multi-label {file}: there is no such file.")
    suffix = file.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"--multi-label {file}: give a file that ends in {', '.join(_SUFFIXES)}.")
    try:
        if suffix == ".json":
            held = json.loads(file.read_text(encoding="utf-8"))
        elif suffix == ".csv":
            with file.open(newline="", encoding="utf-8-sig") as lines:
                reader = csv.DictReader(lines)
                return _from_rows(list(reader), reader.fieldnames or (), file)
        else:
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(file)
            return _from_rows(table.to_pylist(), table.column_names, file)
    except (OSError, ValueError, csv.Error) as problem:
        raise InputError(f"--multi-label {file} cannot be read: {' '.join(str(problem).split())}.") from None
    if isinstance(held, dict) and isinstance(held.get("annotations"), list) and isinstance(held.get("images"), list):
        return _from_coco(held, file)
    if not isinstance(held, dict):
        raise InputError(f"--multi-label {file}: the JSON must map each image to a list of classes, or be COCO's.")
    return _from_mapping(held, f"--multi-label {file}")


def _from_mapping(held: Mapping[str, Any], told: str) -> dict[str, set[str]]:
    wrong = [key for key, value in held.items() if not isinstance(value, list | tuple | set | frozenset)]
    if wrong:
        raise InputError(f"{told}: the classes of {wrong[0]!r} are no list, but {held[wrong[0]]!r}.")
    return {_bare(key): {str(one) for one in value} for key, value in held.items()}


def _from_coco(held: Mapping[str, Any], file: Path) -> dict[str, set[str]]:
    try:
        called = {one["id"]: str(one["name"]) for one in held.get("categories", [])}
        names = {one["id"]: _bare(one["file_name"]) for one in held["images"]}
        found: dict[str, set[str]] = {name: set() for name in names.values()}
        for one in held["annotations"]:
            found[names[one["image_id"]]].add(called[one["category_id"]])
    except (KeyError, TypeError) as problem:
        raise InputError(f"--multi-label {file}: a COCO file in which {problem} is missing.") from None
    return found


def _from_rows(rows: list[dict[str, Any]], columns: Iterable[str], file: Path) -> dict[str, set[str]]:
    known = {str(name).lower(): name for name in columns}
    image, label = (
        next((known[name] for name in wanted if name in known), None) for wanted in (IMAGE_COLUMNS, CLASS_COLUMNS)
    )
    if image is None or label is None:
        missing, wanted = ("images", IMAGE_COLUMNS) if image is None else ("classes", CLASS_COLUMNS)
        raise InputError(
            f"--multi-label {file} has no column of {missing}: it has {', '.join(known.values()) or 'none'}; one of "
            f"{', '.join(wanted)} is looked for."
        )
    confidence = known.get("confidence")
    found: dict[str, set[str]] = {}
    for row in rows:
        classes = found.setdefault(_bare(row[image]), set())
        if confidence is None or float(row[confidence]) > 0:
            cell = row[label]
            several = cell if isinstance(cell, list) else str("" if cell is None else cell).split(";")
            classes.update(name for one in several if (name := str(one).strip()))
    return found


def _bare(name: Any) -> str:
    """A relative path without the ending of an image; other dots are part of the name."""
    path = PurePosixPath(str(name).replace("\\", "/"))
    return (path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path).as_posix()
