"""`clustermim embed`: the features in the file are the encoder's, beside labels, index and fingerprints."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clustermim.cli import run
from clustermim.data.sources import open_source
from clustermim.data.views import to_float
from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError
from clustermim.verbs.embed_images import embed


def test_the_file_holds_the_encoders_features(tmp_path: Path) -> None:
    result = embed("random:vit_micro", "digits#test", out=tmp_path / "f.npz", batch_size=100)
    source = open_source("digits#test")
    encoder = open_encoder("random:vit_micro", view=source.view)
    with np.load(tmp_path / "f.npz", allow_pickle=False) as held:
        assert set(held) == {"global", "mean", "index", "labels", "classes", "fingerprint", "data_fingerprint"}
        assert np.array_equal(held["labels"], source.labels) and np.array_equal(held["index"], np.arange(len(source)))
        assert str(held["fingerprint"]) == result.fingerprint
        assert str(held["data_fingerprint"]) == source.fingerprint()
        rows = [3, 200]
        with torch.no_grad():
            output = encoder(to_float(torch.stack([source[row][0] for row in rows])))
        assert output.cls is not None and output.patches is not None
        np.testing.assert_allclose(held["global"][rows], output.cls.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(held["mean"][rows], output.patches.mean(1).numpy(), rtol=1e-4, atol=1e-5)
    assert result.rows()[0]["global_dim"] == result.dims["mean"]


def test_unlabelled_images_and_parquet(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    embed("raw-pixels", images, out=tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as held:
        assert held["global"].shape == (12, 64) and "labels" not in held and "mean" not in held
    labelled = (images, np.arange(12) % 2)  # of which two are held out for testing
    embed("raw-pixels", labelled, out=tmp_path / "f.parquet")
    embed("raw-pixels", labelled, out=tmp_path / "labelled.npz")
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "f.parquet")
    assert table.num_rows == 10 and {"global", "labels", "index"} == set(table.column_names)
    with np.load(tmp_path / "labelled.npz") as held:
        np.testing.assert_array_equal(np.array(table["global"].to_pylist(), dtype=np.float32), held["global"])
    assert b"fingerprint" in table.schema.metadata


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--encoder raw-pixels --data digits --out f.txt", "must end in .npz or .parquet"),
        ("--encoder raw-pixels --data digits --out there.npz", "is there already"),
        ("--encoder raw-pixel --data digits --out f.npz", "Did you mean 'raw-pixels'"),
    ],
)
def test_bad_input(
    words: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.npz").write_text("precious")
    assert run(["embed", *words.split()]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert Path("there.npz").read_text() == "precious" and not Path("f.npz").exists()
    with pytest.raises(InputError):
        embed("raw-pixels", "digits", out=Path("f.txt"))
