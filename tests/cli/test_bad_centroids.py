"""Centroid files that a user may be handed, through the command line: told, and nothing made or run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from invoking import Invoke

ARGUMENTS = ("--patch-size", 4, "--image-size", 32, "--mean", 0.5, "--std", 0.25)


def bring(fails: Invoke, file: Path, *more: object) -> str:
    out = file.parent / "out"
    message = fails("tokenizer", "import", "--centroids", file, *(more or ARGUMENTS), "--out", out)
    assert not out.exists()
    return message


def test_a_table_of_the_wrong_shape(fails: Invoke, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.ones((48, 50)))
    message = bring(fails, tmp_path / "t.npy")
    assert "(48, 50)" in message and "D = 48" in message and "Transposed, (50, 48) would fit" in message
    np.save(tmp_path / "d.npy", np.ones((50, 27)))
    message = bring(fails, tmp_path / "d.npy")
    assert "50 of 27" in message and "D = 48" in message and "ransposed" not in message


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_table_with_nan_or_infinity(fails: Invoke, tmp_path: Path, bad: float) -> None:
    table = np.ones((50, 48))
    table[7, 3] = bad
    np.save(tmp_path / "t.npy", table)
    assert "NaN or infinity in 1 of 50 rows, the first in row 7" in bring(fails, tmp_path / "t.npy")


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_with_code_in_it_is_refused_and_never_run(fails: Invoke, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    torch.save({"centroids": torch.ones(50, 48), "more": Bomb(mark)}, tmp_path / "t.pt")
    np.save(tmp_path / "t.npy", np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    for name in ("t.pt", "t.npy"):
        assert "could run code, so it is refused" in bring(fails, tmp_path / name)
    assert not mark.exists()


def test_a_file_of_several_tensors_and_no_file(fails: Invoke, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(50, 48), "b": torch.ones(50)}, tmp_path / "t.pt")
    assert "--key" in bring(fails, tmp_path / "t.pt")
    assert "no such file" in bring(fails, tmp_path / "absent.pt")


def test_options_that_are_missing_or_wrong(fails: Invoke, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.random.default_rng(0).random((50, 48)))
    size = ("--patch-size", 4, "--image-size", 32)
    assert "--mean 0 --std 1" in bring(fails, tmp_path / "t.npy", *size)
    assert "patch-size" in bring(fails, tmp_path / "t.npy", *ARGUMENTS[2:])
    assert "Did you mean 'pixel'" in bring(fails, tmp_path / "t.npy", *ARGUMENTS, "--features", "pxel")
    assert "dot" in bring(fails, tmp_path / "t.npy", *ARGUMENTS, "--metric", "dott")
    whitened = bring(fails, tmp_path / "t.npy", *ARGUMENTS, "--features", "pixel?whiten=true")
    assert "to the measure of training images" in whitened
