"""Several classes an image: every spelling of a file tells the same, and what is missing is named."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from clustermim.data.class_lists import read_class_lists
from clustermim.data.sources import open_source
from clustermim.errors import InputError

CLASSES = {
    "a/one.v1.png": ["cat", "sofa"],
    "a/two.png": ["dog"],
    "b/three.png": [],
    "b/four.png": ["sofa", "dog", "cat"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name in CLASSES:
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(root / name)
    return open_source(f"{root}#all")


def told(lists, source):
    """Image -> classes."""
    names = [source.collection.store.label_of(int(row)) for row in source.rows]
    return {name: [lists.names[c] for c in np.flatnonzero(row)] for name, row in zip(names, lists.members, strict=True)}


def write_csv(file, rows):
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows(rows)


def write_mapping(file: Path):
    file.write_text(json.dumps({Path(name).with_suffix("").as_posix(): found for name, found in CLASSES.items()}))


def write_coco(file: Path):
    numbers = {"cat": 3, "dog": 7, "sofa": 11}
    images = [{"id": i, "file_name": Path(name).name} for i, name in enumerate(CLASSES)]
    boxes = [{"image_id": i, "category_id": numbers[c]} for i, found in enumerate(CLASSES.values()) for c in found]
    kinds = [{"id": number, "name": name} for name, number in numbers.items()]
    file.write_text(json.dumps({"images": images, "annotations": boxes * 2, "categories": kinds}))


def write_openimages(file: Path):
    pairs = [(Path(name).name.removesuffix(".png"), c, 1) for name, found in CLASSES.items() for c in found]
    write_csv(file, [("ImageID", "LabelName", "Confidence"), *pairs, ("three", "cat", 0), ("two", "cat", 0)])


def write_cells(file: Path):
    write_csv(file, [("path", "classes"), *((name, "; ".join(found)) for name, found in CLASSES.items())])


def write_parquet(file: Path):
    pyarrow.parquet.write_table(pyarrow.table({"file_name": list(CLASSES), "labels": list(CLASSES.values())}), file)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("map.json", write_mapping),
        ("coco.json", write_coco),
        ("open.csv", write_openimages),
        ("cells.csv", write_cells),
        ("table.parquet", write_parquet),
    ],
)
def test_every_spelling_tells_the_same(source, tmp_path, name, write):
    write(tmp_path / name)
    lists = read_class_lists(tmp_path / name, source)
    assert lists.names == ("cat", "dog", "sofa")
    assert told(lists, source) == {name: sorted(found) for name, found in CLASSES.items()}
    assert np.array_equal(lists.members, read_class_lists(CLASSES, source).members)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.json", None, "no such file"),
        ("list.txt", "x", "ends in .json, .csv, .parquet"),
        ("broken.json", "{", "cannot be read"),
        ("broken.parquet", "PAR", "cannot be read"),
        ("list.json", "[1]", "must map each image"),
        ("word.json", '{"a/two.png": "dog"}', "the classes of 'a/two.png' are no list"),
        ("few.json", '{"a/two.png": ["dog"]}', "does not name 3 of the 4 images"),
        ("coco.json", '{"images": [{"id": 1}], "annotations": []}', "'file_name' is missing"),
        ("columns.csv", "name,class\nx,y\n", "no column of images: it has name, class"),
        ("columns2.csv", "path,colour\nx,y\n", "no column of classes"),
    ],
)
def test_what_cannot_be_used_is_told(source, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_class_lists(tmp_path / name, source)


def test_bare_names_must_be_unambiguous(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / folder / "same.png")
    with pytest.raises(InputError, match="several images of one name"):
        read_class_lists({"same": ["x"]}, open_source(f"{tmp_path}#all"))
