"""Bad input: each is one paragraph that says what is wrong, where, and what to do."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from clustermim.data.loaders import make_loader
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source, open_splits, require_labels
from clustermim.errors import InputError

GREY = np.zeros((20, 4, 4), np.uint8)


def save(path, mode="RGB", size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "--image-size takes one positive number or height and width, not 0"),
        ({"image_size": (1, 2, 3)}, "--image-size takes"),
        ({"channels": 0}, "--channels must be at least 1"),
        ({"crop_scale": (0.5, 0.2)}, "0 < smallest <= largest <= 1, not 0.5 0.2"),
        ({"crop_scale": (0.0, 1.0)}, "--crop-scale"),
        ({"std": (0.0,)}, "--std must be above 0"),
        ({"mean": (float("nan"),)}, "--mean must be finite"),
        ({"value_range": (1.0, 1.0)}, "--value-range takes the value that becomes 0"),
        ({"test_fraction": 1.0}, "--test-fraction must lie between 0 and 1"),
        ({"limit": 0}, "--limit must be at least 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        DataOptions(**options)


def test_on_bad_image_is_one_of_two():
    with pytest.raises(Exception, match=r"on_bad_image|--on-bad-image"):
        DataOptions(on_bad_image="perhaps")


def test_a_path_or_name_that_is_not_there(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match=r"does not exist: there is no 'picturs'.*Did you mean 'pictures'"):
        open_source(tmp_path / "picturs" / "train")
    with pytest.raises(InputError, match=r"neither a known source nor a file or folder here.*Did you mean 'digits'"):
        open_source("digit")


def test_a_split_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"asks for a split 'tset', which does not exist. Did you mean 'test'"):
        open_source("digits#tset")
    with pytest.raises(InputError, match=r"names the split 'train', but 'test' is asked for"):
        open_source("digits#train", split="test")
    with pytest.raises(InputError, match=r"names the split 'train', but training and test images are both needed"):
        open_splits("digits#train")
    for number in range(3):
        save(tmp_path / f"{number}.png")
    with pytest.raises(InputError, match=r"has no test split, and without labels none is held out"):
        open_source(f"{tmp_path}#test")
    with pytest.raises(InputError, match=r"The test split of .* is empty"):
        open_source((GREY[:2], [0, 1]), split="test")


def test_an_empty_folder_or_zip(tmp_path):
    with pytest.raises(InputError, match=r"is empty: put images into it"):
        open_source(tmp_path)
    zipfile.ZipFile(tmp_path / "a.zip", "w").close()
    with pytest.raises(InputError, match=r"zip file .* is empty"):
        open_source(tmp_path / "a.zip")
    (tmp_path / "b.zip").write_text("no zip")
    with pytest.raises(InputError, match=r"cannot be opened as a zip file"):
        open_source(tmp_path / "b.zip")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds no images: its 1 file\(s\) \(notes.txt\)"):
        open_source(tmp_path)
    with pytest.raises(InputError, match=r"is of no kind that can be read"):
        open_source(tmp_path / "notes.txt")


def test_loose_images_beside_class_folders(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "cat" / "b.png")
    with pytest.raises(InputError, match=r"mixes loose images \(a.png\) with folders of images \(cat/b.png\)"):
        open_source(tmp_path)


def test_more_than_a_tenth_bad_images(tmp_path):
    for number in range(9):
        save(tmp_path / f"{number}.png")
    (tmp_path / "x.jpg").write_text("x")
    assert len(open_source(tmp_path)) == 9
    with pytest.raises(InputError, match=r"1 of the 10 files .*: x.jpg \(not an image\).*--on-bad-image skip"):
        open_source(tmp_path, DataOptions(on_bad_image="error"))
    (tmp_path / "y.csv").write_text("y")
    with pytest.raises(InputError, match=r"2 of the 11 files .*y.csv \(.csv is no image suffix\).*right files"):
        open_source(tmp_path)


def test_labels_that_are_needed(tmp_path):
    for number in range(3):
        save(tmp_path / "cats" / f"{number}.png")
    with pytest.raises(InputError, match=r"TCAS needs labelled images.*folder 'cats', a single class"):
        require_labels(open_source(tmp_path), "TCAS")
    with pytest.raises(InputError, match=r"holds a single class, '3'"):
        require_labels(open_source((GREY, np.full(20, 3))), "TCAS")
    with pytest.raises(InputError, match=r"needs labelled images"):
        require_labels(open_source(GREY), "A probe")


def test_values_out_of_range(tmp_path):
    for kind in (np.float32, np.float64, np.int16):
        x = np.linspace(-4, 300, 160).reshape(10, 4, 4).astype(kind)
        np.savez(tmp_path / "a.npz", x=x)
        with pytest.raises(InputError, match=r"pixels from -4 to 300.*--value-range -4 300"):
            open_source(tmp_path / "a.npz")
        image = open_source(tmp_path / "a.npz", DataOptions(value_range=(-4, 300)))[9][0]
        assert image.max() == 1


def test_an_npz_of_another_kind(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY)
    with pytest.raises(InputError, match=r"no array 'x' .*images \(20, 4, 4\).*np.savez"):
        open_source(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_text("x")
    with pytest.raises(InputError, match=r"cannot be read as an .npz file"):
        open_source(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", x=GREY, slide=np.arange(20), short=np.arange(3))
    with pytest.raises(InputError, match=r"no array 'slid' to group by. Did you mean 'slide'"):
        open_source(tmp_path / "c.npz", DataOptions(group="slid"))
    with pytest.raises(InputError, match=r"one value for each of the 20 images"):
        open_source(tmp_path / "c.npz", DataOptions(group="short"))
    np.savez(tmp_path / "d.npz", x=GREY, y=np.arange(19))
    with pytest.raises(InputError, match=r"19 labels for 20 images"):
        open_source(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, 4)), r"images are \(n, H, W\) or \(n, H, W, C\)"),
        (np.zeros((0, 4, 4)), "holds no images"),
        (np.zeros((5, 3, 32, 32)), r"looks like \(n, C, H, W\)"),
        (np.zeros((5, 4, 4), complex), "complex128"),
    ],
)
def test_arrays_that_are_no_images(images, message):
    with pytest.raises(InputError, match=message):
        open_source(images)


def test_labels_that_are_none():
    with pytest.raises(InputError, match=r"one label for each image"):
        open_source((GREY, np.zeros((20, 5))))
    with pytest.raises(InputError, match=r"whole numbers or text"):
        open_source((GREY, np.linspace(0, 1, 20)))
    with pytest.raises(InputError, match=r"8 of 20 images of the all split .* have no label"):
        open_source((GREY, np.where(np.arange(20) < 8, -1, 1)), split="all")


def test_groups_that_cannot_be(tmp_path):
    for name in ("cat", "dog"):
        for number in range(3):
            save(tmp_path / name / f"{number}.png")
    with pytest.raises(InputError, match=r"no valid regular expression"):
        open_source(tmp_path, DataOptions(group="("))
    with pytest.raises(InputError, match=r"exactly one group"):
        open_source(tmp_path, DataOptions(group="patient"))
    with pytest.raises(InputError, match=r"finds nothing in cat/0.png"):
        open_source(tmp_path, DataOptions(group="(patient)"))
    with pytest.raises(InputError, match=r"cannot be used with digits"):
        open_source("digits", DataOptions(group="writer"))


def test_channels_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match=r"images of 5 channel\(s\), which cannot become 3"):
        open_source(np.zeros((20, 4, 4, 5), np.uint8), DataOptions(channels=3))
    with pytest.raises(InputError, match=r"--mean has 3 value"):
        _ = open_source(GREY, DataOptions(mean=(0.1, 0.2, 0.3))).view


def test_parquet_without_images(tmp_path, monkeypatch):
    import datasets
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parquet.write_table(pyarrow.table({"a": [1, 2], "b": ["x", "y"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"has no column of images.*a \(int64\), b \(string\)"):
        open_source(tmp_path / "t.parquet")
    (tmp_path / "u.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"u.parquet cannot be read"):
        open_source(tmp_path / "u.parquet")
    cells = [{"bytes": b"no image", "path": None}] * 3
    parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "v.parquet")
    with pytest.raises(InputError, match=r"3 of the 3 files or rows .*row 0 \(not an image\)"):
        open_source(tmp_path / "v.parquet")
    with pytest.raises(InputError, match=r"unknown key 'confg'. Did you mean 'config'"):
        open_source("hf://owner/name?confg=a")


def test_loaders_that_cannot_be():
    source = open_source(GREY)
    with pytest.raises(InputError, match=r"20 images, too few for a batch of 32: use a --batch-size of at most 20"):
        make_loader(source, batch_size=32, train=True)
    with pytest.raises(InputError, match=r"on each of 3 devices: use a --batch-size of at most 6"):
        make_loader(source, batch_size=8, train=True, world_size=3)
    with pytest.raises(InputError, match=r"--batch-size must be at least 1"):
        make_loader(source, batch_size=0, train=True)
    with pytest.raises(InputError, match=r"--workers must be at least 0"):
        make_loader(source, batch_size=1, train=True, workers=-1)
    many = open_source(np.zeros((20, 4, 4, 5), np.uint8))
    with pytest.raises(InputError, match=r"images of 5 channel\(s\), which cannot become the 1"):
        make_loader(many, source.view, batch_size=2, train=True)


def test_things_that_are_no_data():
    with pytest.raises(InputError, match=r"A pair"):
        open_source((GREY, [0] * 20, "more"))
    with pytest.raises(InputError, match=r"cannot be read from a dict: give a name, a path"):
        open_source({"a": torch.zeros(1)})
