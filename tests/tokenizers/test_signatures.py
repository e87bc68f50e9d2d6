"""Each failure signature provoked, alone and through a fit; and a healthy fit that has none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clustermim.tokenizers.signatures as signatures
from clustermim.cli import run
from clustermim.data.sources import ImageSource, open_source
from clustermim.tokenizers.fitting import fit
from clustermim.tokenizers.importing import import_centroids
from clustermim.tokenizers.kmeans import fit_kmeans
from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_starts_that_disagree() -> None:
    assert signatures.start_spread([]) is None and signatures.start_spread([3.0]) is None
    assert signatures.start_spread([1.0, 1.01, 1.02]) is None and signatures.start_spread([0.0, 0.0]) is None
    found = signatures.start_spread([1.0, 1.25, 1.1])
    assert found is not None and found.value == pytest.approx(0.25) and "25 %" in found.says
    assert "--n-init to 12" in found.says


def test_unused_tokens() -> None:
    assert signatures.unused_tokens(100, 100) is None and signatures.unused_tokens(995, 1000) is None
    found = signatures.unused_tokens(40, 50)
    assert found is not None and found.value == 10 and "--k of about 40" in found.says


def test_uneven_use() -> None:
    assert signatures.uneven_use(26.0, 100, 0.1) is None
    for learned, remedy in ((False, "--metric cosine"), (True, "--epochs")):
        told = signatures.uneven_use(3.2, 100, 0.8, learned=learned)
        assert told is not None and remedy in told.says
    found = signatures.uneven_use(3.2, 100, 0.8)
    assert found is not None and found.value == 3.2 and "80 %" in found.says


def test_tokens_too_rare_to_score() -> None:
    assert signatures.rare_tokens(np.array([0, 0, 50, 10]), 60) is None  # unused is not rare
    found = signatures.rare_tokens(np.array([0, 9, 50, 1]), 60)
    assert found is not None and found.value == 2 and "2 of 3" in found.says and "60 images" in found.says


def test_constant_features() -> None:
    assert signatures.constant_dimensions([], 8) is None
    found = signatures.constant_dimensions(list(range(2, 9)), 12)
    assert found is not None and found.value == 7 and "7 of 12" in found.says and "2, 3, 4, 5, 6, …" in found.says


@settings(deadline=None, max_examples=15)
@given(k=st.integers(2, 300), d=st.integers(1, 9), rows=st.integers(1, 400), seed=st.integers(0, 999))
def test_the_nearest_other_centroid_in_blocks(k: int, d: int, rows: int, seed: int) -> None:
    c = 100 + gaussian(seed, k, d)
    before, signatures._BLOCK_SCORES = signatures._BLOCK_SCORES, rows * k
    try:
        squared, other = signatures.nearest_other(c, torch.arange(k))
    finally:
        signatures._BLOCK_SCORES = before
    naive = (c[:, None].double() - c[None].double()).square().sum(2).fill_diagonal_(torch.inf)
    assert (other != torch.arange(k)).all()
    torch.testing.assert_close(squared, naive.gather(1, other[:, None])[:, 0])
    assert (squared <= naive.min(1).values + 1e-5).all()  # float32 may take the second of two that are as near


def test_near_duplicates() -> None:
    c = gaussian(0, 40, 6)
    error = 1.0
    assert signatures.near_duplicates(c, error) is None
    twins = torch.cat([c, c[:3] + 1e-3, c[:1]])
    found = signatures.near_duplicates(twins, error)
    # Of the three tokens with a copy nearby, the first has two: seven tokens in all.
    assert found is not None and found.value == 7 and "closest: 0 and 43" in found.says
    assert signatures.near_duplicates(torch.cat([c, c]), error).value == 80  # type: ignore[union-attr]
    assert signatures.near_duplicates(10 * twins, error, unit=True).value == 7  # type: ignore[union-attr]
    many = signatures.near_duplicates((torch.arange(30_000) % 7)[:, None].float(), error)
    assert many is not None and many.value == 8192 and "of 8,192 tokens that were compared" in many.says
    exact = signatures.near_duplicates(twins, 0.0)
    assert exact is not None and exact.value == 2


def test_to_merge_near_duplicates_costs_what_the_threshold_says() -> None:
    """Two halves of one blob, merged: the squared error grows by d²/4."""
    x = 0.5 * gaussian(1, 20_000, 2)
    x[:, 0] *= 0.02
    left = x[:, 0] < 0
    a, b = x[left].mean(0), x[~left].mean(0)
    apart = torch.cat([x[left] - a, x[~left] - b]).square().sum(1).mean()
    merged = (x - (a + b) / 2).square().sum(1).mean()
    gap = (a - b).square().sum()
    assert float(merged / apart - 1) == pytest.approx(float(gap / 4 / apart), rel=0.05)


@pytest.mark.parametrize("features", ["pixel", "pixel?standardise=true"])
def test_noise_of_many_dimensions_and_fine_vocabularies_are_no_duplicates(features: str) -> None:
    x = np.random.default_rng(0).random((60, 16, 16, 3))
    made = fit(open_source(x), patch_size=8, features=features, k=10)
    assert "near-duplicate tokens" not in [found["name"] for found in made.facts["signatures"]]
    flat = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    result = fit_kmeans(lambda: iter([flat]), 400)
    assert signatures.near_duplicates(result.centroids, result.inertia / 4000) is None


def source_of(images: np.ndarray) -> ImageSource:
    return open_source(images, split="all")


def imported(table: torch.Tensor, source: ImageSource) -> Tokenizer:
    return import_centroids(table, "pixel", patch_size=4, view=source.view)


def test_usage_is_that_of_the_ids() -> None:
    source = source_of(np.random.default_rng(0).random((50, 8, 8, 1)).astype(np.float32))
    made = imported(gaussian(0, 7, 16), source)
    ids = made(torch.stack([source[i][0] for i in range(50)]))
    usage = signatures.usage_of(made, source, batch_size=7)
    assert usage.counts.tolist() == torch.bincount(ids.flatten(), minlength=7).tolist()
    assert usage.images_with.tolist() == [int((ids == token).any(1).sum()) for token in range(7)]
    assert made.features is not None and made.codebook is not None
    described = made.features(torch.stack([source[i][0] for i in range(50)])).flatten(0, 1)
    assert usage.error == pytest.approx(float(made.codebook.distances(described).min(1).values.mean()), rel=1e-4)
    part = signatures.usage_of(made, source, most=10)
    assert part.images == 10 and part.counts.sum() == 40
    assert signatures.usage_of(made, source, measure=False).error is None


def test_a_bad_tokenizer_shows_all_of_it() -> None:
    images = np.random.default_rng(0).random((12, 8, 8, 1)).astype(np.float32)
    images[:, :, ::4] = 0.5  # a column that all images share
    source = source_of(images)
    near = gaussian(0, 4, 16)
    made = imported(torch.cat([near, near + 1e-4, 1e3 + gaussian(1, 20, 16)]), source)
    signatures.note_signatures(made, source)
    names = {found["name"] for found in made.facts["signatures"]}
    assert names == {
        "unused tokens",
        "near-duplicate tokens",
        "uneven use",
        "tokens too rare to score",
        "constant features",
    }
    row = made.rows()[0]
    assert all(name in row["signatures"] for name in names) and "0, 4, 8, 12" in row["advice"]
    fine = imported(near, source)
    before = fine.fingerprint()
    signatures.note_signatures(fine, source)
    assert fine.fingerprint() == before  # no token depends on what was found


def test_a_healthy_fit_has_none_and_a_sparse_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fitted(name: str, *more: str) -> str:
        capsys.readouterr()
        out = str(tmp_path / name)
        assert run(["tokenizer", "fit", "--data", "digits", "--out", out, "--json", f"{out}.json", *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "signatures │ none" in fitted("good", "--k", "20", "--patch-size", "4")
    assert load_tokenizer(tmp_path / "good").facts["signatures"] == []
    assert json.loads((tmp_path / "good.json").read_text())[0]["signatures"] == "none"
    told = fitted("sparse", "--k", "500", "--patch-size", "2", "--limit", "60")
    assert "Tokens too rare to score." in told and "Choose a smaller --k" in told
    held = load_tokenizer(tmp_path / "sparse").facts["signatures"]
    assert "tokens too rare to score" in [found["name"] for found in held]
    row = json.loads((tmp_path / "sparse.json").read_text())[0]
    assert "tokens too rare to score" in row["signatures"] and all(found["says"] in row["advice"] for found in held)
    assert len(load_tokenizer(tmp_path / "good").facts["starts"]) == 4


def test_controls_are_what_they_are() -> None:
    source = source_of(np.random.default_rng(0).random((12, 8, 8, 1)))
    for kind in ("identity", "random", "random-centroids", "position"):
        assert "signatures" not in fit(source, patch_size=4, k=4, kind=kind).facts
