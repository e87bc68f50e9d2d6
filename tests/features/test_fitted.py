"""Features that are fitted first: moments of a stream, whitening, scales and principal components of a join."""

import numpy as np
import pytest
import torch
from feature_samples import images, passes, view
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from clustermim.errors import InputError
from clustermim.features.moments import BLOCK, Moments, Spread
from clustermim.features.patches import PatchFeatures, make_features
from clustermim.features.pixel import PixelFeatures
from clustermim.features.projection import Projection, eigen, inverse_roots

SIDE = 4


def fitted(spec: str, x: torch.Tensor, **options: int) -> PatchFeatures:
    height, width = x.shape[2:]
    features = make_features(spec, patch_size=SIDE, view=view(height, width, x.shape[1]))
    features.fit(passes(x, 16))
    return features


def covariance(rows: torch.Tensor) -> np.ndarray:
    return np.cov(rows.flatten(0, 1).double().numpy(), rowvar=False, bias=True)


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(0, 3000), min_size=1, max_size=6), dim=st.integers(1, 5), seed=st.integers(0, 99))
def test_moments_are_numpy_s_however_the_rows_are_cut(cuts: list[int], dim: int, seed: int) -> None:
    rows = torch.randn(sum(cuts) + 1, dim, generator=torch.Generator().manual_seed(seed)) * 3 + 100
    rows[:, 0] = 0.1
    moments, spread, whole = Moments(dim), Spread(dim, len(rows)), Moments(dim)
    for part in rows.split([*cuts, 1]):
        moments.add(part)
        spread.add(part)
    whole.add(rows)
    moments.finish("rows")
    whole.finish("rows")
    exact = rows.double().numpy()
    assert moments.rows == spread.rows == len(rows)
    np.testing.assert_allclose(moments.mean.numpy(), exact.mean(0), rtol=1e-12)
    want = np.atleast_2d(np.cov(exact, rowvar=False, bias=True)) if len(rows) > 1 else np.zeros((dim, dim))
    np.testing.assert_allclose(moments.covariance.numpy(), want, atol=1e-9)
    assert torch.equal(moments.covariance, whole.covariance) and torch.equal(moments.mean, whole.mean)
    constant = [bool((rows[:, d] == rows[0, d]).all()) for d in range(dim)]
    assert moments.constant.tolist() == spread.constant.tolist() == constant
    np.testing.assert_allclose(spread.variance.numpy(), want.diagonal(), atol=1e-9)
    assert [v == 0 for v in spread.variance.tolist()] == constant
    assert spread.facts()["constant_dimensions"] == [d for d in range(dim) if constant[d]]


def test_a_spread_over_more_rows_than_it_takes_looks_at_all_for_constancy() -> None:
    rows = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = 5.0
    spread = Spread(2, 10 << 17)  # every tenth row
    for part in rows.split(7):
        spread.add(part)
    np.testing.assert_allclose(spread.variance[0], rows[::10, 0].double().var(correction=0), rtol=1e-9)
    assert spread.constant.tolist() == [False, True]
    rows[51, 1] = 6.0  # not among the tenths
    spread = Spread(2, 10 << 17)
    spread.add(rows)
    assert spread.constant.tolist() == [False, False] and float(spread.variance[1]) > 0


def test_moments_hold_one_block_at_most() -> None:
    moments = Moments(3)
    for _ in range(5):
        moments.add(torch.randn(BLOCK - 1, 3))
        assert sum(len(part) for part in moments._held) < BLOCK


@pytest.mark.parametrize("spec", ["pixel?whiten=true&epsilon=0", "pixel?context=6&whiten=true&epsilon=1e-6"])
def test_whitened_patches_have_no_correlation(spec: str) -> None:
    x = images(16, 24, count=200)
    found = covariance(fitted(spec, x)(x))
    np.testing.assert_allclose(found, np.eye(len(found)), atol=2e-2 if "context" in spec else 2e-3)


def test_damped_whitening_against_numpy() -> None:
    x = images(16, 24, count=100)
    plain = make_features("pixel", patch_size=SIDE, view=view())(x)
    got = fitted("pixel?whiten=true&epsilon=0.1", x)(x)
    values, vectors = np.linalg.eigh(covariance(plain))
    rows = plain.flatten(0, 1).double().numpy()
    matrix = vectors @ np.diag((values + 0.1 * values.mean()) ** -0.5) @ vectors.T
    np.testing.assert_allclose(got.flatten(0, 1).numpy(), (rows - rows.mean(0)) @ matrix, atol=1e-4)


def test_directions_without_variance_stay_without() -> None:
    # A standardised patch has mean 0: one direction that does not vary, whose noise must not be blown up.
    x = images(16, 24, channels=1, count=100)
    found = covariance(fitted("pixel?standardise=true&whiten=true&epsilon=0", x)(x))
    np.testing.assert_allclose(np.linalg.eigvalsh(found), [0.0] + [1.0] * 15, atol=2e-3)


@pytest.mark.parametrize("spec", ["pixel", "pixel?context=8", "pixel?whiten=true", "pixel?context=6&whiten=true"])
def test_pixel_features_become_pixels_again(spec: str) -> None:
    x = images(16, 24, count=50)
    features = fitted(spec, x)
    assert isinstance(features, PixelFeatures)
    shown = features.to_pixels(features(x[:2]).flatten(0, 1))
    margin = (features.window - SIDE) // 2
    inner = shown[:, :, margin : margin + SIDE, margin : margin + SIDE]
    patches = x[:2].unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    torch.testing.assert_close(inner, patches, atol=1e-3, rtol=1e-3)


def test_the_parts_of_a_join_weigh_the_same() -> None:
    x = images(16, 24, count=60)
    joined = fitted("pixel+hog", x)
    got = covariance(joined(x)).diagonal()
    np.testing.assert_allclose([got[:48].sum(), got[48:].sum()], 1.0, rtol=1e-3)
    parts = torch.cat([make_features(spec, patch_size=SIDE, view=view())(x) for spec in ("pixel", "hog")], 2)
    ratio = joined(x) / parts
    assert all(float(part[part.isfinite()].std()) < 1e-4 for part in ratio.split([48, 9], 2))


def test_without_balance_a_join_is_its_parts_side_by_side() -> None:
    shown, x = view(), images()
    joined = make_features("pixel+pixel?standardise=true&context=6|balance=false", patch_size=SIDE, view=shown)
    specs = ("pixel", "pixel?standardise=true&context=6")
    parts = [make_features(spec, patch_size=SIDE, view=shown)(x) for spec in specs]
    assert torch.equal(joined(x), torch.cat(parts, 2)) and not joined.needs_fit


@pytest.mark.parametrize("whiten", [False, True])
def test_principal_components_are_scikit_learn_s(whiten: bool) -> None:
    x = images(16, 24, count=80)
    plain = make_features("pixel", patch_size=SIDE, view=view())(x).flatten(0, 1).double().numpy()
    features = make_features(f"pixel|pca=7&whiten={whiten}&epsilon=0", patch_size=SIDE, view=view())
    facts = features.fit(passes(x, 9))
    got = features(x).flatten(0, 1).numpy()
    peer = PCA(7, whiten=whiten, svd_solver="full").fit(plain)
    want = peer.transform(plain)
    signs = np.sign((got * want).sum(0))
    np.testing.assert_allclose(got * signs, want, atol=2e-3)
    assert facts["pca_explained_variance"] == pytest.approx(peer.explained_variance_ratio_.sum(), rel=1e-6)


def test_all_components_keep_all_distances() -> None:
    x = images(16, 24, count=30)
    near, far = fitted("pixel+hog", x)(x)[0], fitted("pixel+hog|pca=57", x)(x)[0]
    torch.testing.assert_close(torch.cdist(near, near), torch.cdist(far, far), atol=1e-3, rtol=1e-3)


@settings(deadline=None, max_examples=20)
@given(rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_eigenvalues_that_are_rounding_are_zero(rank: int, seed: int) -> None:
    rows = torch.randn(5, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values, vectors = eigen(rows @ rows.T)
    assert int((values > 0).sum()) == rank and int((inverse_roots(values, 0.0) > 0).sum()) == rank
    torch.testing.assert_close((vectors * values) @ vectors.T, rows @ rows.T, atol=1e-8, rtol=1e-8)


def test_a_projection_undone() -> None:
    projection = Projection(4, 4)
    generator = torch.Generator().manual_seed(0)
    projection.set(torch.randn(4, generator=generator), torch.randn(4, 4, generator=generator))
    rows = torch.randn(6, 4, generator=generator)
    torch.testing.assert_close(projection.undo(projection(rows)), rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", ["pixel?whiten=true", "pixel+hog", "hog|pca=3", "pixel?whiten=true|balance=false"])
def test_what_is_not_fitted_says_so(spec: str) -> None:
    with pytest.raises(InputError, match="fit"):
        make_features(spec, patch_size=SIDE, view=view())(images())


@pytest.mark.parametrize("spec", ["pixel?whiten=true", "pixel+hog", "hog|pca=3", "pixel|whiten=true"])
def test_images_of_one_colour_cannot_be_fitted(spec: str) -> None:
    with pytest.raises(InputError, match="no variance"):
        fitted(spec, torch.full((4, 3, 16, 24), 0.5))


def test_broken_and_missing_images_cannot_be_fitted() -> None:
    bad = images()
    bad[3, 0, 5, 5] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        fitted("pixel?whiten=true", bad)
    with pytest.raises(InputError, match="no patches"):
        fitted("pixel?whiten=true", images()[:0])


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("pixel|pca=49", "48 at most"),
        ("pixel|pca=0", "at least 1"),
        ("pixel|pca=many", "whole number"),
        ("pixel|pac=3", "Did you mean 'pca'"),
        ("pixel|", r"\|pca=64"),
        ("pixel|pca", r"\|key=value"),
        ("pixel|pca=3|whiten=true", "one `|` at most"),
        ("pixel?whiten=true&epsilon=-1", "at least 0"),
        ("pixel?whiten=true&epsilon=small", "at least 0"),
        ("pixel?epsilon=0.1", "whiten=true"),
        ("pixel?whiten=perhaps", "true or false"),
    ],
)
def test_bad_options_are_told(spec: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make_features(spec, patch_size=SIDE, view=view())
