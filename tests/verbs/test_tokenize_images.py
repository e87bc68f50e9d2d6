"""`tokenize`: ids in a file and in shards, the same as the tokenizer gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clustermim.cli import run
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.errors import InputError
from clustermim.tokenizers.tokenizer import Tokenizer
from clustermim.verbs.tokenize_images import tokenize
from clustermim.verbs.tokenizer_fit import fit_tokenizer

OPTIONS = DataOptions(limit=150)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return fit_tokenizer("digits", k=12, options=OPTIONS)


def test_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    result = tokenize(tokenizer, "digits", out=tmp_path / "ids.npz", json=tmp_path / "r.json", options=OPTIONS)
    held = np.load(tmp_path / "ids.npz")
    source = open_source("digits", OPTIONS)
    x = torch.stack([source[i][0] for i in range(len(source))])
    assert np.array_equal(held["ids"], tokenizer.encode(x).numpy())
    assert np.array_equal(held["labels"], source.labels) and np.array_equal(held["index"], np.arange(len(source)))
    assert str(held["fingerprint"]) == tokenizer.fingerprint() == result.fingerprint
    assert int(held["vocab_size"]) == 12 and held["grid"].tolist() == [4, 4] and len(held["classes"]) == 10
    assert result.images == len(source) and result.patches == held["ids"].size
    assert json.loads((tmp_path / "r.json").read_text()) == result.rows()
    assert result.used_tokens == len(np.unique(held["ids"])) and 1 < result.perplexity <= 12


def test_shards_hold_what_the_file_holds(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenize(tokenizer, "digits", out=tmp_path / "ids.npz", options=OPTIONS)
    result = tokenize(tokenizer, "digits", out=tmp_path / "ids", shard_size=40, batch_size=7, options=OPTIONS)
    whole = np.load(tmp_path / "ids.npz")
    files = sorted((tmp_path / "ids").glob("*.npz"))
    shards = [np.load(file) for file in files]
    assert [len(shard["ids"]) for shard in shards] == [40, 40, 40, 30] and result.files == 4
    for name in ("ids", "labels", "index"):
        assert np.array_equal(np.concatenate([shard[name] for shard in shards]), whole[name])
    assert all(str(shard["fingerprint"]) == tokenizer.fingerprint() for shard in shards)


def test_image_size_and_channels_are_the_tokenizer_s(tokenizer: Tokenizer, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (9, 16, 20, 3), dtype=np.uint8)
    tokenize(tokenizer, x, out=tmp_path / "ids.npz")
    held = np.load(tmp_path / "ids.npz")
    assert held["ids"].shape == (9, 16) and "labels" not in held.files
    with pytest.raises(InputError, match="--image-size 8 8"):
        tokenize(tokenizer, x, out=tmp_path / "no.npz", options=DataOptions(image_size=16))


def test_controls_get_index_and_labels(tmp_path: Path) -> None:
    for kind in ("identity", "oracle"):
        made = fit_tokenizer("digits", kind=kind, options=OPTIONS)  # type: ignore[arg-type]
        tokenize(made, "digits", out=tmp_path / f"{kind}.npz", options=OPTIONS)
    assert len(np.unique(np.load(tmp_path / "identity.npz")["ids"])) == 150 * 16
    oracle = np.load(tmp_path / "oracle.npz")
    assert np.array_equal(oracle["ids"], np.repeat(oracle["labels"][:, None], 16, 1))
    with pytest.raises(InputError, match="label"):
        tokenize(made, np.zeros((4, 8, 8)), out=tmp_path / "none.npz")


def test_the_command_and_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit_tokenizer("digits", k=5, out=tmp_path / "t", options=OPTIONS)
    command = ["tokenize", "--tokenizer", str(tmp_path / "t"), "--limit", "50", "--out", str(tmp_path / "ids.npz")]
    assert run([*command, "--data", "digits#test"]) == 0
    before = (tmp_path / "ids.npz").read_bytes()
    assert run(command) == 2 and "there already" in capsys.readouterr().err
    assert (tmp_path / "ids.npz").read_bytes() == before
    assert run(["tokenize", "--tokenizer", str(tmp_path / "tt"), "--out", str(tmp_path / "x.npz")]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("words")
    assert run([*command[:-1], str(tmp_path / "mine")]) == 2 and "thesis.tex" in capsys.readouterr().err
