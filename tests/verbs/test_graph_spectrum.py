"""`clustermim graph` on real images: what must hold of any graph of masks, and what it refuses."""

import json

import numpy as np
import pytest

from clustermim.cli import run
from clustermim.data.options import DataOptions
from clustermim.errors import InputError
from clustermim.verbs.graph_spectrum import PLAIN, graph
from clustermim.verbs.tokenizer_fit import fit_tokenizer

FEW = DataOptions(limit=120)


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "pixel": fit_tokenizer("digits", k=12, patch_size=2),
        "oracle": fit_tokenizer("digits", kind="oracle", patch_size=2),
        "identity": fit_tokenizer("digits", kind="identity", patch_size=2, options=FEW),
    }


def test_tokens_connect_images_and_classes(tokenizers, tmp_path):
    result = graph(list(tokenizers.values()), options=FEW, masks=2, html=tmp_path / "g.html")
    plain, pixel, oracle, identity = result.reports.values()
    # Without tokens, and with one token a patch, every image is a part of its own.
    assert plain.components == identity.components == 120 and plain.labelling_error == identity.labelling_error == 0
    assert identity.eigenvalues == pytest.approx(plain.eigenvalues) and plain.spectral_gap == pytest.approx(0)
    assert oracle.components == 10 and oracle.labelling_error == 0 and oracle.sum_squared == pytest.approx(10)
    assert pixel.components == 1 and 0 < pixel.labelling_error < 1 and pixel.sum_squared < plain.sum_squared
    assert pixel.hidden <= 12 and pixel.visible == 240 and pixel.intra_class > pixel.inter_class
    assert "Spectrum" in (tmp_path / "g.html").read_text()


def test_the_command_line_writes_one_row_a_graph(tmp_path, capsys):
    arguments = ["graph", "--data", "digits", "--patch-size", "4", "--limit", "40", "--json", str(tmp_path / "g.json")]
    assert run(arguments) == 0
    assert "Augmentation graph" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "g.json").read_text())
    assert row["tokens"] == PLAIN and row["c2"] == 2 and row["bound"] == pytest.approx(row["sum_squared"])


def test_unlabelled_images_have_a_spectrum_but_no_error(tokenizers):
    images = np.random.default_rng(0).integers(0, 255, (30, 8, 8), dtype=np.uint8)
    result = graph(tokenizers["pixel"], images)
    report = result.reports["kmeans-12"]
    assert report.labelling_error is None and report.sum_squared > 1 and result.rows()[1]["bound"] is None
    with pytest.raises(InputError, match="needs labels"):
        graph(tokenizers["oracle"], images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs --patch-size"),
        ({"patch_size": 3}, "3"),
        ({"patch_size": 2, "masks": 0}, "--masks"),
        ({"patch_size": 2, "mask_ratio": 1.0}, "ratio"),
        ({"patch_size": 2, "c2": -1.0}, "--c2"),
    ],
)
def test_what_has_no_graph_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        graph(data="digits", **options)


def test_patch_sizes_must_agree(tokenizers):
    with pytest.raises(InputError, match="one patch size"):
        graph(tokenizers["pixel"], patch_size=4)


def test_the_toy_model_is_reached_drawn_and_what_theory_says(tmp_path, works):
    files = ("--json", tmp_path / "t.json", "--html", tmp_path / "t.html")
    assert "the toy model, n = 8, m = 4" in works("graph", "--toy", 8, 4, *files)
    rows = json.loads((tmp_path / "t.json").read_text())
    found = {row["tokens"]: row["second_eigenvalue"] for row in rows}
    assert found == {
        "identity": pytest.approx(1 / 4),
        "class-wise": pytest.approx(1 / 8),
        "cross-class": pytest.approx(0),
    }
    page = (tmp_path / "t.html").read_text()
    assert page.count("<svg ") == 2 and "cross-class" in page


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (("--toy", 7, 4), "even"),
        (("--toy", 4, 8), "m = 8"),
        (("--toy", 8, 4, "--data", "digits"), "leave out"),
        (("--toy", 8), "--toy"),
    ],
)
def test_a_toy_that_is_none_is_told(fails, line, told):
    assert told in fails("graph", *line)


def test_a_few_images_of_different_classes_are_drawn(tokenizers):
    result = graph([tokenizers["pixel"], tokenizers["oracle"]], options=FEW, masks=2)
    plain, pixel, oracle = result.drawings.values()
    assert plain[0].shape[0] == 6 and plain[0].shape[1] > pixel[0].shape[1] >= oracle[0].shape[1] == 3
    for weights, members in result.drawings.values():
        assert weights.sum(axis=1) == pytest.approx(np.ones(6)) and (members.sum(axis=0) > 0).sum() == 3
    assert result.html().count("<svg ") == 2
    large = graph(patch_size=1, options=FEW, masks=2)
    assert not large.drawings and large.html().count("<svg ") == 1
