"""Every kind of source gives the images, labels, splits and defaults that were put into it."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from image_kinds import tiff
from PIL import Image
from torch.utils.data import Dataset

from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source, open_splits, require_labels

RNG = np.random.default_rng(0)


def picture(value, size=(10, 12), mode="RGB"):
    return Image.new(mode, (size[1], size[0]), value)


def write_tree(root, count=10, classes=("cat", "dog"), size=(10, 12)):
    """`count` pictures a class; the red of a picture says which it is."""
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture((10 * number, 100 * place, 0), size).save(root / name / f"{number:02d}.png")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(image):
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_parquet(path, pictures, labels=None, names=None, **columns):
    import pyarrow
    from pyarrow import parquet

    cells = [{"bytes": encoded(image), "path": None} for image in pictures]
    table = {"image": pyarrow.array(cells, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))}
    if labels is not None:
        table["label"] = pyarrow.array(labels)
    table |= {name: pyarrow.array(values) for name, values in columns.items()}
    table = pyarrow.table(table)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path)


def test_digits():
    train, test = open_splits("digits")
    assert len(train) + len(test) == 1797 and len(open_source("digits#all")) == 1797
    assert train.channels == 1 and train.view.image_size == (8, 8)
    assert train.view.flip is False and train.view.crop_scale == (0.8, 1.0)
    image, label = train[0]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert label == train.labels[0] and train.classes == tuple("0123456789")
    assert abs(np.bincount(test.labels) / 1797 - np.bincount(train.labels) / 4 / 1797).max() < 0.01
    assert test.view == train.view
    assert len(open_source("digits")) == len(train) and len(open_source("digits#test")) == len(test)
    everything = open_source("digits#all")
    mean = torch.stack([everything[place][0] for place in range(len(everything))]).mean()
    assert abs(train.view.mean[0] - mean) < 0.01


def test_class_folders(tmp_path):
    train, test = open_splits(write_tree(tmp_path / "pets"))
    assert train.classes == ("cat", "dog") and np.bincount(train.labels).tolist() == [8, 8]
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert train.view.image_size == (10, 12) and train.channels == 3 and train.view.flip is True
    everything = open_source(f"{tmp_path / 'pets'}#all")
    assert [everything[place][0][0, 0, 0].item() for place in range(3)] == [0, 10, 20]
    assert everything.labels.tolist() == [0] * 10 + [1] * 10
    assert require_labels(everything, "TCAS").tolist() == everything.labels.tolist()


def test_a_class_folder_may_be_a_link(tmp_path):
    write_tree(tmp_path / "pets")
    (tmp_path / "links").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "pets" / name)
    (tmp_path / "links" / "dog" / "up").symlink_to(tmp_path / "links")
    assert len(open_source(f"{tmp_path / 'links'}#all")) == 20


def test_flat_folder_holds_nothing_out(tmp_path):
    write_tree(tmp_path, classes=("one",))
    source = open_source(tmp_path / "one")
    assert len(source) == 10 and source.labels is None and source.classes is None and source[3][1] is None
    assert len(open_source(f"{tmp_path / 'one'}#all")) == 10


def test_train_and_test_folders_and_folders_around_them(tmp_path):
    write_tree(tmp_path / "outer" / "train", 6)
    write_tree(tmp_path / "outer" / "val", 3)
    write_tree(tmp_path / "outer" / "test", 2)
    (tmp_path / "outer" / ".DS_Store").write_text("x")
    for path in (tmp_path / "outer", tmp_path):
        train, test = open_splits(path)
        assert (len(train), len(test), len(open_source(f"{path}#all"))) == (12, 4, 22)
        assert train.classes == test.classes == ("cat", "dog")
    for folder in ("cat", "dog"):
        for file in (tmp_path / "outer" / "test" / folder).iterdir():
            file.unlink()
    assert len(open_splits(tmp_path / "outer")[1]) == 6


def test_a_class_may_be_called_train(tmp_path):
    source = open_source(f"{write_tree(tmp_path, classes=('car', 'train'))}#all")
    assert source.classes == ("car", "train")


def test_zip_equals_the_folder(tmp_path):
    folder = write_tree(tmp_path / "pets")
    with zipfile.ZipFile(tmp_path / "pets.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, path.relative_to(tmp_path))
        file.writestr("__MACOSX/pets/cat/._00.png", b"junk")
    ours, theirs = open_source(tmp_path / "pets.zip"), open_source(folder)
    assert ours.labels.tolist() == theirs.labels.tolist() and ours.classes == theirs.classes
    assert all(torch.equal(ours[place][0], theirs[place][0]) for place in range(len(ours)))
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again[3][0], ours[3][0]) and again.view == ours.view


def test_parquet_file_and_folder(tmp_path):
    pictures = [picture((10 * number, 0, 0)) for number in range(20)]
    labels = [number % 2 for number in range(20)]
    write_parquet(tmp_path / "data.parquet", pictures, labels, patient=[f"p{number // 4}" for number in range(20)])
    train, test = open_splits(tmp_path / "data.parquet")
    assert (len(train), len(test), train.classes) == (16, 4, ("0", "1"))
    grouped = open_splits(tmp_path / "data.parquet", DataOptions(group="patient"))
    assert not set(grouped[0].groups) & set(grouped[1].groups)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_parquet(folder / "train-00000-of-00002.parquet", pictures[:8], labels[:8], ("cat", "dog", "eel"))
    write_parquet(folder / "train-00001-of-00002.parquet", pictures[8:14], labels[8:14], ("cat", "dog", "eel"))
    write_parquet(folder / "test-00000-of-00001.parquet", pictures[14:], labels[14:], ("cat", "dog", "eel"))
    train, test = open_splits(folder)
    assert (len(train), len(test), train.classes) == (14, 6, ("cat", "dog"))
    assert train[9][0][0, 0, 0] == 90 and test[1][0][0, 0, 0] == 150 and train.view.image_size == (10, 12)
    again = pickle.loads(pickle.dumps(test))
    assert torch.equal(again[1][0], test[1][0])


def test_hugging_face_dataset_in_python():
    import datasets

    cells = [{"bytes": encoded(picture((10 * number, 0, 0))), "path": None} for number in range(10)]
    table = datasets.Dataset.from_dict({"image": cells, "label": [0, 1] * 5}).select([3, 4, 5, 0])
    source = open_source(table, split="all")
    assert [source[place][0][0, 0, 0].item() for place in range(4)] == [30, 40, 50, 0]
    assert source.labels.tolist() == [1, 0, 1, 0]


def test_webdataset_shards(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "shard-000.tar", "w") as shard:
        for number in range(6):
            for suffix, body in (("png", encoded(picture((10 * number, 0, 0)))), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(body)
                shard.addfile(member, io.BytesIO(body))
    source = open_source(f"{tmp_path / 'shard-000.tar'}#all")
    assert source.labels.tolist() == [0, 1] * 3 and source[4][0][0, 0, 0] == 40


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(20, 5, 7), (20, 5, 7, 4)])
def test_npz_of_every_type(tmp_path, dtype, shape):
    full = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    x = (RNG.random(shape) * full).astype(dtype)
    slide = np.arange(20) // 5
    np.savez(tmp_path / "a.npz", x=x, y=np.array(["b", "a"] * 10), slide=slide)
    source = open_source(f"{tmp_path / 'a.npz'}#all", DataOptions(group="slide"))
    image, label = source[2]
    expected = np.moveaxis(np.atleast_3d(x[2]), -1, 0) / full
    got = image.numpy() / (255 if image.dtype == torch.uint8 else 1)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert source.channels == (4 if len(shape) == 4 else 1) and source.view.image_size == (5, 7)
    assert source.classes == ("a", "b") and label == 1 and source.groups.tolist() == slide.tolist()


def test_arrays_tensors_and_pairs():
    x = RNG.integers(0, 256, (30, 6, 8, 3), dtype=np.uint8)
    array, tensor = open_source(x), open_source(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    assert torch.equal(array[4][0], tensor[4][0]) and array.labels is None and len(array) == 30
    train, test = open_splits((x, np.arange(30) % 3))
    assert (len(train), len(test)) == (24, 6)
    assert torch.equal(open_source(train, split="test")[1][0], test[1][0])


class Pairs(Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 12

    def __getitem__(self, place):
        array = np.full((4, 6, 3), place, np.uint8)
        image = {"pil": Image.fromarray(array), "array": array, "tensor": torch.from_numpy(array).permute(2, 0, 1)}
        image["dict"] = array
        if self.kind == "dict":
            return {"image": array, "label": place % 2}
        return image[self.kind], torch.tensor(place % 2)


@pytest.mark.parametrize("kind", ["pil", "array", "tensor", "dict"])
def test_a_dataset_in_python(kind):
    source = open_source(Pairs(kind), split="all")
    image, label = source[5]
    assert image.shape == (3, 4, 6) and image.dtype == torch.uint8 and (image == 5).all() and label == 1


def test_multichannel_tiff_folder_and_single_file(tmp_path):
    for number in range(12):
        array = RNG.integers(0, 65536, (5, 8, 9), dtype=np.uint16)
        (tmp_path / f"{number}.tif").write_bytes(tiff(array, photometric="minisblack"))
    source = open_source(tmp_path)
    assert source.channels == 5 and source.view.image_size == (8, 9) and len(source.view.mean) == 5
    assert open_source(tmp_path / "3.tif")[0][0].shape == (5, 8, 9)
    ranged = open_source(tmp_path, DataOptions(value_range=(0, 1000)))
    assert (ranged[0][0] == 1).float().mean() > 0.9


def test_channels_follow_the_data_and_the_option(tmp_path):
    for number in range(6):
        picture(90, mode="L").save(tmp_path / f"grey{number}.png")
    assert open_source(tmp_path).channels == 1 and open_source(tmp_path, DataOptions(channels=3)).channels == 3
    picture((90, 0, 0), (20, 20)).save(tmp_path / "colour.png")
    mixed = open_source(tmp_path)
    assert mixed.channels == 3 and all(mixed[place][0].shape[0] == 3 for place in range(7))
    assert mixed.view.image_size == (224, 224)
    grey = open_source(tmp_path, DataOptions(channels=1, image_size=16))
    assert grey.view.channels == 1 and grey.view.image_size == (16, 16) and grey[0][0].shape[0] == 1


def test_statistics_and_their_options():
    x = RNG.integers(0, 256, (50, 6, 8, 3), dtype=np.uint8)
    x[..., 2] = 51
    view = open_source(x).view
    np.testing.assert_allclose(view.mean, x.mean((0, 1, 2)) / 255, atol=1e-5)
    np.testing.assert_allclose(view.std[:2], x.std((0, 1, 2))[:2] / 255, atol=1e-5)
    assert view.std[2] == 1.0
    told = open_source(x, DataOptions(mean=(0.1, 0.2, 0.3), std=(1, 1, 1), flip=False, crop_scale=(0.5, 1))).view
    assert told.mean == (0.1, 0.2, 0.3) and told.flip is False and told.crop_scale == (0.5, 1.0)


def test_groups_from_folders_and_patterns(tmp_path):
    for patient in range(6):
        for name in ("ill", "well"):
            (tmp_path / name / f"p{patient}").mkdir(parents=True)
            for number in range(2):
                picture((patient, number, 0)).save(tmp_path / name / f"p{patient}" / f"{number}.png")
    train, test = open_splits(tmp_path, DataOptions(group="(p[0-9])/"))
    assert train.classes == ("ill", "well") and not set(train.groups) & set(test.groups)
    assert set(train.groups) | set(test.groups) == {f"p{patient}" for patient in range(6)}
    assert "ill/p0" in open_source(f"{tmp_path}#all", DataOptions(group="folder")).groups


def test_limit_is_stratified_and_per_split():
    train, test = open_splits("digits", DataOptions(limit=50))
    assert len(train) == len(test) == 50 and np.bincount(train.labels).min() >= 4


def test_fingerprint_tells_what_matters(tmp_path):
    write_tree(tmp_path / "a")
    write_tree(tmp_path / "b")
    prints = [
        open_source(tmp_path / "a").fingerprint(),
        open_source(f"{tmp_path / 'a'}#test").fingerprint(),
        open_source(tmp_path / "a", DataOptions(channels=1)).fingerprint(),
        open_source(tmp_path / "a", DataOptions(split_seed=1)).fingerprint(),
        open_source("digits").fingerprint(),
    ]
    assert len(set(prints)) == 5
    assert open_source(tmp_path / "b").fingerprint() == prints[0]
    assert open_source(tmp_path / "a", DataOptions(flip=False, image_size=4)).fingerprint() == prints[0]
    (tmp_path / "b" / "cat" / "00.png").write_bytes(encoded(picture((1, 2, 3), (30, 40))))
    assert open_source(tmp_path / "b").fingerprint() != prints[0]


def test_bad_images_are_counted_named_and_skipped(tmp_path):
    write_tree(tmp_path, 20)
    whole = (tmp_path / "cat" / "03.png").read_bytes()
    (tmp_path / "cat" / "03.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog" / "05.png").write_text("no image")
    (tmp_path / "readme.txt").write_text("hello")
    source = open_source(f"{tmp_path}#all")
    assert len(source) == 38
    assert [name for name, _ in source.skipped] == ["readme.txt", "cat/03.png", "dog/05.png"]
    message = source.skipped_message()
    assert message.startswith("3 file(s)") and "cat/03.png" in message and "dog/05.png (not an image)" in message
    assert len(open_source(tmp_path).skipped) == 3


def test_nan_images_of_an_array_are_skipped():
    x = RNG.random((40, 4, 4)).astype(np.float32)
    x[7, 0, 0] = np.nan
    source = open_source(x)
    assert len(source) == 39 and source.skipped == [("image 7", "NaN or infinite pixels")]
