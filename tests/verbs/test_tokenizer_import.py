"""`tokenizer import`, as a function and as a command: what the verbs behind it make of the result."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import clustermim
from clustermim.cli import run
from clustermim.data.options import DataOptions
from clustermim.errors import InputError
from clustermim.runs import read_manifest
from clustermim.tokenizers.tokenizer import load_tokenizer
from clustermim.verbs.tokenizer_fit import fit_tokenizer


def test_a_fitted_table_comes_back_as_the_same_tokens(tmp_path: Path) -> None:
    fitted = fit_tokenizer("digits", k=12, patch_size=2, options=DataOptions(limit=80))
    assert fitted.codebook is not None and fitted.features is not None
    config = fitted.features.config()
    np.save(tmp_path / "c.npy", fitted.codebook.centroids.numpy())
    numbers = [str(config[name][0]) for name in ("mean", "std")]
    arguments = ["--centroids", str(tmp_path / "c.npy"), "--patch-size", "2", "--image-size", "8", "--channels", "1"]
    arguments += ["--mean", numbers[0], "--std", numbers[1], "--json", str(tmp_path / "t.json")]
    assert run(["tokenizer", "import", *arguments, "--out", str(tmp_path / "t")]) == 0
    again = load_tokenizer(tmp_path / "t")
    images = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(images), fitted(images)) and again(images).dtype == torch.int64
    assert json.loads((tmp_path / "t.json").read_text()) == again.rows()
    manifest = read_manifest(tmp_path / "t")
    assert (manifest["status"], manifest["tokenizer"]) == ("finished", again.fingerprint())
    for verb in ("tokenize", "tcas"):
        more = ["--out", str(tmp_path / "ids.npz")] if verb == "tokenize" else []
        assert run([verb, "--tokenizer", str(tmp_path / "t"), "--data", "digits", "--limit", "80", *more]) == 0
    config_file = str(tmp_path / "t" / "config.yaml")
    assert run(["tokenizer", "import", "--config", config_file, "--out", str(tmp_path / "repeated")]) == 0
    assert load_tokenizer(tmp_path / "repeated").fingerprint() == again.fingerprint()


def test_in_python_a_tensor_or_an_array_will_do() -> None:
    table = torch.randn(5, 4 * 4 * 3, generator=torch.Generator().manual_seed(0))
    made = [
        clustermim.import_tokenizer(t, patch_size=4, image_size=(8, 12), mean=(0.5,), std=(0.25,), metric="dot")
        for t in (table, table.numpy())
    ]
    assert made[0].fingerprint() == made[1].fingerprint()
    assert made[0].grid == (2, 3) and made[0].features is not None
    assert made[0].features.config()["mean"] == [0.5] * 3
    assert made[0](torch.rand(2, 3, 8, 12)).shape == (2, 6)


def test_pixels_need_their_statistics_and_networks_have_their_own() -> None:
    table = torch.randn(5, 48)
    with pytest.raises(InputError, match="--mean is needed"):
        clustermim.import_tokenizer(table, patch_size=4, image_size=8)
    with pytest.raises(InputError, match="--mean has 2 value"):
        clustermim.import_tokenizer(table, patch_size=4, image_size=8, mean=(0.5, 0.5), std=(0.2,))
    with pytest.raises(InputError, match="1, 2, 4, 8"):
        clustermim.import_tokenizer(table, patch_size=3, image_size=8, mean=(0.0,), std=(1.0,))
