"""Centroids from files: what is read, what is refused, and that a pickle with code in it is never run."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from clustermim.data.views import ViewConfig
from clustermim.errors import InputError
from clustermim.tokenizers.codebook import Metric
from clustermim.tokenizers.importing import import_centroids, read_centroids

VIEW = ViewConfig(image_size=(8, 12), channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
TABLE = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))

WRITERS: dict[str, Callable[[Path], object]] = {
    "c.npy": lambda path: np.save(path, TABLE.numpy()),
    "big_endian.npy": lambda path: np.save(path, TABLE.numpy().astype(">f4")),
    "c.pt": lambda path: torch.save(TABLE, path),
    "one.pth": lambda path: torch.save({"centroids": TABLE}, path),
    "nested.pth": lambda path: torch.save({"epoch": 3, "model": {"quantize": {"embedding": TABLE}}}, path),
    "c.safetensors": lambda path: safetensors.torch.save_file({"embedding": TABLE}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_is_read(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert torch.equal(read_centroids(tmp_path / name), TABLE)


def test_one_of_several_tensors_is_named(tmp_path: Path) -> None:
    file = tmp_path / "several.pt"
    torch.save({"model": {"codes": TABLE, "usage": torch.ones(7)}}, file)
    with pytest.raises(InputError, match=r"2 tensors \(model.codes \(7, 48\), model.usage \(7,\)\): say with --key"):
        read_centroids(file)
    assert torch.equal(read_centroids(file, "model.codes"), TABLE)
    with pytest.raises(InputError, match=r"Did you mean 'model.codes'"):
        read_centroids(file, "model.code")


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tokens_are_the_nearest_of_the_table(metric: Metric, dtype: torch.dtype) -> None:
    images = torch.rand(5, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    made = import_centroids(TABLE.to(dtype), "pixel", patch_size=4, view=VIEW, metric=metric)
    # A patch is its rows, then columns, then channels: cut out here by hand.
    patches = torch.stack([images[:, :, r : r + 4, c : c + 4] for r in (0, 4) for c in (0, 4, 8)], 1)
    x, table = patches.permute(0, 1, 3, 4, 2).flatten(2).double(), TABLE.to(dtype).double()
    if metric == "l2":
        want = torch.cdist(x, table.expand(5, -1, -1)).argmin(2)
    else:
        want = (x @ (torch.nn.functional.normalize(table, dim=1) if metric == "cosine" else table).t()).argmax(2)
    ids = made(images)
    assert ids.dtype == torch.int64 and torch.equal(ids, want)


class Bomb:
    """Creates a file when it is unpickled: the code in a malicious pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def write_bombs(folder: Path, mark: Path) -> list[Path]:
    """The same malicious object in every file that could carry one."""
    torch.save({"centroids": TABLE, "more": Bomb(mark)}, folder / "zip.pt")
    torch.save({"centroids": TABLE, "more": Bomb(mark)}, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "plain.pt").write_bytes(pickle.dumps(Bomb(mark)))
    np.save(folder / "objects.npy", np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    (folder / "raw.npy").write_bytes(pickle.dumps(Bomb(mark)))
    return sorted(folder.iterdir())


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    mark, folder = tmp_path / "it_ran", tmp_path / "files"
    folder.mkdir()
    files = write_bombs(folder, mark)
    assert not mark.exists()
    for file in files:
        with pytest.raises(InputError, match="refused"):
            read_centroids(file)
        assert not mark.exists(), file
    pickle.loads((folder / "plain.pt").read_bytes())  # the charge was live
    assert mark.exists()


BAD_TABLES = {
    "transposed": (torch.randn(48, 7), r"shape \(48, 7\).*D = 48. Transposed, \(7, 48\) would fit"),
    "other features": (torch.randn(7, 75), r"7 of 75 numbers.*D = 48. Name the features"),
    "a vector": (torch.randn(48), r"shape \(48,\); a table \(K, D\) is needed.*D = 48"),
    "three axes": (torch.randn(7, 4, 12), r"shape \(7, 4, 12\)"),
    "a single row": (torch.randn(1, 48), "one centroid tells no patches apart"),
    "empty": (torch.randn(0, 48), "K is 2 or more"),
    "integers": (torch.ones(7, 48, dtype=torch.uint8), "uint8; floats are needed"),
    "complex": (torch.ones(7, 48, dtype=torch.complex64), "complex64; floats are needed"),
    "NaN": (TABLE.index_fill(0, torch.tensor([3, 5]), float("nan")), "NaN or infinity in 2 of 7 rows.*row 3"),
    "infinity": (TABLE.index_fill(0, torch.tensor([6]), float("-inf")), "in 1 of 7 rows.*row 6"),
    "too large for float32": (TABLE.double() * 1e39, "NaN or infinity"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_tables_that_do_not_fit_are_told(name: str) -> None:
    table, told = BAD_TABLES[name]
    with pytest.raises(InputError, match=told):
        import_centroids(table, "pixel", patch_size=4, view=VIEW)


def test_features_that_need_training_images_are_refused() -> None:
    for features in ("pixel?whiten=true", "pixel+hog", "hog|pca=3"):
        with pytest.raises(InputError, match=r"\|balance=false"):
            import_centroids(TABLE, features, patch_size=4, view=VIEW)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "good.npy", TABLE.numpy())
    (tmp_path / "c.csv").write_text("1,2")
    for name, told in {
        "cut.npy": "damaged",
        "cut.safetensors": "damaged",
        "none.pt": "holds no tensor",
        "words.npy": "real numbers",
        "c.csv": r"\.npy, \.pt, \.pth, \.safetensors, not from \.csv",
        "god.npy": r"Did you mean '.*good\.npy'",
    }.items():
        with pytest.raises(InputError, match=told):
            read_centroids(tmp_path / name)
    with pytest.raises(InputError, match="Leave --key out"):
        read_centroids(tmp_path / "good.npy", "centroids")
