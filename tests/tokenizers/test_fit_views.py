"""Centroids from training views: the same in every pass and at any batch size, and noted; features that never vary."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clustermim.cli import run
from clustermim.data.counted import uniform
from clustermim.data.loaders import make_loader
from clustermim.data.sources import ImageSource, open_source
from clustermim.tokenizers.fitting import fit
from clustermim.tokenizers.tokenizer import load_tokenizer


def source() -> ImageSource:
    x = uniform(5, torch.arange(70 * 12 * 12)).view(70, 12, 12, 1).numpy()
    return open_source(x, split="all")


@pytest.mark.parametrize("workers", [None, 0])
def test_every_image_comes_once_in_its_training_view(workers: int | None) -> None:
    images = source()
    train = make_loader(images, batch_size=7, train=True, seed=3, workers=workers)
    cut = {int(i): view for batch in train.epoch() for i, view in zip(batch.index, batch.images, strict=True)}
    ordered = make_loader(images, batch_size=16, train=False, crops=True, seed=3, workers=workers)
    seen = [(int(i), view) for batch in ordered.epoch() for i, view in zip(batch.index, batch.images, strict=True)]
    assert [i for i, _ in seen] == list(range(70)) and len(cut) == 70
    for i, view in seen:
        torch.testing.assert_close(view, cut[i], atol=1e-6, rtol=1e-6)


def test_training_views_give_other_centroids_whatever_the_batch() -> None:
    made = {
        (views, batch): fit(source(), patch_size=4, k=6, fit_views=views, batch_size=batch)
        for views, batch in (("eval", 32), ("train", 32), ("train", 9))
    }
    plain, first, second = (tokenizer.codebook.centroids for tokenizer in made.values() if tokenizer.codebook)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, first, atol=1e-2)
    assert made["train", 9].facts["fit_views"] == "train" and made["eval", 32].facts["fit_views"] == "eval"
    assert made["train", 9].facts["patches"] == 70 * 9


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tokenizer", "fit", "--limit", "60", "--k", "5", "--features", "pixel?whiten=true", "--out"]
    assert run([*arguments, str(tmp_path / "t"), "--fit-views", "train"]) == 0
    assert load_tokenizer(tmp_path / "t").facts["fit_views"] == "train"
    assert run([*arguments, str(tmp_path / "u"), "--fit-views", "both"]) == 2
    assert "fit-views" in capsys.readouterr().err


@pytest.mark.parametrize("features", ["pixel", "hog", "pixel?whiten=true", "pixel+hog"])
def test_images_of_one_colour_are_told(tmp_path: Path, features: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "grey.npz", x=np.full((30, 8, 8), 128, np.uint8))
    out = tmp_path / "t"
    arguments = ["tokenizer", "fit", "--data", str(tmp_path / "grey.npz"), "--features", features, "--patch-size", "4"]
    assert run([*arguments, "--std", "1", "--k", "4", "--out", str(out)]) == 2
    assert "no variance" in " ".join(capsys.readouterr().err.split()) and not out.exists()


def test_dimensions_that_never_vary_are_noted() -> None:
    x = source()[0][0].new_zeros(40, 8, 8, 2)
    x[..., 0] = uniform(1, torch.arange(40 * 64)).view(40, 8, 8)
    facts = fit(open_source(x.numpy(), split="all"), patch_size=4, k=4).facts
    assert facts["constant_dimensions"] == list(range(1, 32, 2))
    assert [value > 0 for value in facts["feature_variance"]] == [True, False] * 16
