"""IDX files give back what was written into them, and Fashion-MNIST is found in a folder of them."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from clustermim.data import idx, resolving
from clustermim.data.idx import FASHION_MNIST_CLASSES, from_fashion_mnist, read_idx
from clustermim.data.sources import open_splits
from clustermim.errors import InputError

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def as_idx(array: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, CODES[array.dtype.name], array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@given(
    st.sampled_from(sorted(CODES)).flatmap(
        lambda kind: (
            arrays.arrays(kind, arrays.array_shapes(max_dims=3, max_side=4), elements={"allow_nan": False})
            if kind.startswith("float")
            else arrays.arrays(kind, arrays.array_shapes(max_dims=3, max_side=4))
        )
    ),
    st.booleans(),
)
def test_there_and_back(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, packed: bool) -> None:
    file = tmp_path_factory.mktemp("idx") / "file"
    file.write_bytes(gzip.compress(as_idx(array)) if packed else as_idx(array))
    found = read_idx(file)
    assert found.dtype == array.dtype and found.dtype.isnative
    np.testing.assert_array_equal(found, array)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = as_idx(np.arange(12, dtype=np.uint8).reshape(3, 4))
    for name, content, words in (
        ("short", whole[:-1], "damaged"),
        ("long", whole + b"\0", "damaged"),
        ("head", whole[:9], "no IDX file"),
        ("text", b"not an array at all", "no IDX file"),
        ("empty", b"", "no IDX file"),
        ("packed", gzip.compress(whole)[:-12], "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}.*{words}"):
            read_idx(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(tmp_path / "absent")


def write_fashion(folder: Path, train: int = 20, test: int = 10, side: int = 28) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir()
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (train + test, side, side), dtype=np.uint8)
    labels = (np.arange(train + test) % 10).astype(np.uint8)
    for prefix, part in (("train", slice(0, train)), ("t10k", slice(train, None))):
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(as_idx(pictures[part])))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(as_idx(labels[part])))
    return pictures, labels


def test_fashion_mnist_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, labels = write_fashion(tmp_path / "fashion")
    monkeypatch.setattr(resolving, "from_fashion_mnist", lambda: from_fashion_mnist([tmp_path / "fashion"]))
    train, test = open_splits("fashion-mnist")
    assert (len(train), len(test)) == (20, 10) and train.classes == FASHION_MNIST_CLASSES
    assert train.view.image_size == (28, 28) and train.channels == 1
    assert train.view.flip is True and train.view.crop_scale == (0.5, 1.0)
    np.testing.assert_array_equal(train[3][0][0].numpy(), pictures[3])
    np.testing.assert_array_equal(test[4][0][0].numpy(), pictures[24])
    assert train.labels is not None and train.labels.tolist() == labels[:20].tolist()


def test_files_that_do_not_fit_each_other(tmp_path: Path) -> None:
    write_fashion(tmp_path / "fashion")
    labels = tmp_path / "fashion" / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(as_idx(np.zeros(9, dtype=np.uint8)))
    with pytest.raises(InputError, match=r"test files.*\(10, 28, 28\).*\(9,\)"):
        from_fashion_mnist([tmp_path / "fashion"])
    labels.unlink()
    with pytest.raises(InputError, match="t10k-labels"):
        from_fashion_mnist([tmp_path / "fashion"])


def test_without_files_and_hub_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(address: str) -> None:
        raise InputError(f"{address} cannot be read: no network.")

    monkeypatch.setattr(idx, "from_hub", offline)
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        from_fashion_mnist([tmp_path / "absent"])


@pytest.mark.skipif(not idx.FASHION_MNIST_FOLDERS[0].is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_files_open() -> None:
    train, test = open_splits("fashion-mnist")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels is not None and np.bincount(train.labels).tolist() == [6000] * 10
    assert abs(train.view.mean[0] - 0.286) < 0.01
