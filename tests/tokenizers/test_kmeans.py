"""K-means against scikit-learn's and against plain loops, its properties, and what it refuses."""

import itertools
import statistics
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

import clustermim.tokenizers.streams as streams
from clustermim.data.counted import Stream, counter_hash
from clustermim.errors import InputError
from clustermim.tokenizers.kmeans import KMeansResult, fit_kmeans
from clustermim.tokenizers.lloyd import add_up, lloyd_steps
from clustermim.tokenizers.nearest import nearest_to
from clustermim.tokenizers.sampling import draw_sample

Blocks = Callable[[], Iterable[torch.Tensor]]


def cut(x: torch.Tensor, rows: int) -> Blocks:
    return lambda: iter(torch.split(x, rows))


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(seed: int, n: int, centres: int, dim: int, spread: float) -> torch.Tensor:
    middle = 4 * gaussian(seed, centres, dim)
    return middle[torch.arange(n) % centres] + spread * gaussian(seed + 1, n, dim)


def naive_inertia(x: torch.Tensor, result: KMeansResult) -> float:
    return float(torch.cdist(x.double(), result.centroids.double()).min(1).values.square().sum())


SETS = {
    "noise": lambda: gaussian(0, 1500, 8),
    "blobs": lambda: blobs(1, 2400, 12, 6, 0.6),
    "uneven": lambda: torch.cat([gaussian(2, 1500, 5), 8 + 0.1 * gaussian(3, 100, 5), 20 * gaussian(4, 30, 5)]),
    "offset": lambda: 1000 + blobs(5, 1500, 9, 4, 1.0),
    "thin": lambda: gaussian(6, 2000, 1).repeat(1, 3) + 0.01 * gaussian(7, 2000, 3),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("k", [2, 40])
def test_inertia_is_at_most_half_a_percent_above_scikit_learn_s(name: str, k: int) -> None:
    x = SETS[name]()
    # Medians: a single start is a lottery, for either.
    ours = [fit_kmeans(cut(x, 700), k, seed=seed) for seed in range(3)]
    theirs = [KMeans(k, n_init=1, random_state=seed).fit((x - x.mean(0)).numpy()).inertia_ for seed in range(3)]
    assert statistics.median(r.inertia for r in ours) <= 1.005 * statistics.median(theirs)
    assert ours[0].inertia == pytest.approx(naive_inertia(x, ours[0]), rel=1e-4)
    assert int(ours[0].counts.sum()) == ours[0].num_rows == len(x)


def test_well_parted_groups_are_found() -> None:
    result = fit_kmeans(cut(blobs(1, 2000, 10, 6, 0.01), 300), 10)
    middle = 4 * gaussian(1, 10, 6)
    assert (result.counts == 200).all()
    assert float(torch.cdist(result.centroids, middle).min(1).values.max()) < 0.01


def test_centroids_are_means_and_the_inertia_falls() -> None:
    x = gaussian(0, 1000, 3)
    result = fit_kmeans(cut(x, 512), 7, tol=0.0, max_passes=500)
    ids = torch.cdist(x.double(), result.centroids.double()).argmin(1)
    assert torch.equal(torch.bincount(ids, minlength=7), result.counts)
    for i in range(7):
        torch.testing.assert_close(result.centroids[i], x[ids == i].mean(0), atol=1e-4, rtol=1e-4)
    falling = [step["inertia"] for step in result.history if step["stage"] == "full"]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(falling))
    assert result.counts.tolist() == sorted(result.counts.tolist(), reverse=True)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample and blocks so small that tiny data take the road of large data."""
    monkeypatch.setattr(streams, "BLOCK", 256)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.usefixtures("small_blocks")
def test_batches_change_nothing_and_seeds_do(metric: str) -> None:
    x = gaussian(3, 3000, 5)
    runs = [fit_kmeans(cut(x, rows), 9, metric=metric, seed=1, sample_size=700) for rows in (37, 256, 3000)]  # type: ignore[arg-type]
    for other in runs[1:]:
        assert torch.equal(other.centroids, runs[0].centroids)
        assert torch.equal(other.counts, runs[0].counts) and other.inertia == runs[0].inertia
    assert any(step["rows"] == 3000 and step["stage"] == "full" for step in runs[0].history)
    assert not torch.equal(fit_kmeans(cut(x, 100), 9, metric=metric, seed=2).centroids, runs[0].centroids)  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_blocks")
def test_no_global_randomness() -> None:
    x = gaussian(3, 1000, 3)
    torch.manual_seed(0)
    first = fit_kmeans(cut(x, 100), 5)
    state = torch.get_rng_state()
    second = fit_kmeans(cut(x, 100), 5)
    assert torch.equal(first.centroids, second.centroids) and torch.equal(state, torch.get_rng_state())


@pytest.mark.usefixtures("small_blocks")
@settings(deadline=None, max_examples=15)
@given(n=st.integers(1, 3000), limit=st.integers(4, 900), rows=st.integers(1, 700), seed=st.integers(0, 9))
def test_the_sample_is_the_rows_of_the_smallest_hashes(n: int, limit: int, rows: int, seed: int) -> None:
    x = torch.arange(float(n))[:, None].repeat(1, 2)
    with streams.PassProgress("rows", show=False) as bar:
        sample = draw_sample(streams.RowStream(cut(x, rows), unit=False, bar=bar), 1, seed, limit)
    keys = counter_hash(seed, Stream.SAMPLE, torch.arange(n))
    assert sample.rows[:, 0].long().tolist() == keys.argsort()[:limit].tolist()
    assert len(sample) == min(n, limit) and sample.prefix(2).num_rows == min(n, 2)


@pytest.mark.usefixtures("small_blocks")
def test_the_sample_is_uniform_and_each_prefix_too() -> None:
    x = torch.arange(20_000.0)[:, None]
    with streams.PassProgress("rows", show=False) as bar:
        stream = streams.RowStream(cut(x, 333), unit=False, bar=bar)
        sample = draw_sample(stream, 2, 0, 2000).rows[:, 0]
    assert stream.num_rows == 20_000 and stream.largest == 19_999
    assert len(sample) == 2000 == len(sample.unique())
    for rows in (200, 2000):
        assert abs(float(sample[:rows].mean()) - 10_000) < 4 * 5774 / rows**0.5


def test_spherical_k_means() -> None:
    directions = torch.nn.functional.normalize(gaussian(0, 6, 12), dim=1)
    lengths = 0.1 + 5 * torch.rand(1200, 1, generator=torch.Generator().manual_seed(1))
    x = lengths * (directions[torch.arange(1200) % 6] + 0.02 * gaussian(2, 1200, 12))
    result = fit_kmeans(cut(x, 100), 6, metric="cosine")
    torch.testing.assert_close(result.centroids.norm(dim=1), torch.ones(6))
    assert (result.counts == 200).all()
    cosine = torch.nn.functional.normalize(x, dim=1) @ result.centroids.t()
    assert result.inertia == pytest.approx(float((2 - 2 * cosine.max(1).values).sum()), rel=1e-3)
    assert float((directions @ result.centroids.t()).max(1).values.min()) > 0.999


@pytest.mark.usefixtures("small_blocks")
def test_empty_clusters_move_to_the_rows_of_largest_error() -> None:
    # Four far rows that the sample will miss: only the full passes can find them.
    x = torch.cat([0.1 * gaussian(0, 4000, 2), torch.tensor([[50.0, 0], [0, 50], [-50, 0], [0, -50]])])
    start = torch.cat([0.1 * gaussian(0, 2, 2), 1e4 + gaussian(1, 4, 2)])  # four centroids that no row is near
    data = streams.RowsInMemory(x)
    history: list[dict[str, float | int | str]] = []
    found, centroids = lloyd_steps(data, start, "l2", 20, 1e-3, history, "full")
    assert [step["empty"] for step in history][:3] == [4, 4, 0]
    assert not len(found.empty)
    assert float(torch.cdist(x[-4:], centroids).min(1).values.max()) < 1e-4


@pytest.mark.usefixtures("small_blocks")
@settings(deadline=None, max_examples=8)
@given(k=st.integers(2, 24), copies=st.integers(1, 60), seed=st.integers(0, 99))
def test_as_many_clusters_as_distinct_rows(k: int, copies: int, seed: int) -> None:
    """Rows that repeat: each distinct one gets its own centroid, however rare."""
    points = torch.stack([torch.arange(k) % 5, torch.arange(k) // 5], 1).float()
    x = torch.cat([points, points[:1].expand(k * copies, 2)])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    result = fit_kmeans(cut(x, 50), k, seed=seed, sample_size=2 * k)
    assert (result.counts > 0).all() and result.inertia < 1e-6
    with pytest.raises(InputError, match=f"{k} among {len(x)}"):
        fit_kmeans(cut(x, 50), k + 1, seed=seed)


def test_every_start_tells_its_inertia_and_the_best_goes_on() -> None:
    x = gaussian(0, 900, 3)
    for count in (1, 5):
        result = fit_kmeans(cut(x, 100), 12, n_init=count)
        assert len(result.starts) == count
        full = next(step["inertia"] for step in result.history if step["stage"] == "full")
        assert float(full) == pytest.approx(min(result.starts), rel=1e-6)


def test_float64_rows_are_clustered_in_float64() -> None:
    x = 1e3 + gaussian(0, 800, 3).double()
    result = fit_kmeans(cut(x, 100), 5, tol=0.0, max_passes=200)
    assert result.centroids.dtype == torch.float64
    ids = torch.cdist(x - 1e3, result.centroids - 1e3).argmin(1)
    for i in range(5):
        torch.testing.assert_close(result.centroids[i], x[ids == i].mean(0), rtol=0.0, atol=1e-5)


def test_longer_steps_need_fewer_of_them_and_end_no_worse() -> None:
    x = gaussian(0, 4000, 4)
    plain = x[:64].clone()
    for _ in range(25):
        found = add_up(streams.RowsInMemory(x), plain, "l2", 0, exact_order=True)
        plain = (found.sums / found.counts.clamp_min(1)[:, None]).float()
    history: list[dict[str, float | int | str]] = []
    lloyd_steps(streams.RowsInMemory(x), x[:64].clone(), "l2", 25, 0.0, history, "full")
    assert float(history[-1]["inertia"]) < found.inertia / len(x)
    assert any(float(step["inertia"]) < found.inertia / len(x) for step in history[:20])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("k", [2, 50, 512, 700])
def test_the_search_while_fitting_finds_the_nearest(k: int, metric: str) -> None:
    c, x = 3 + gaussian(0, k, 6), 3 + gaussian(1, 900, 6)
    if metric == "cosine":
        c = torch.nn.functional.normalize(c, dim=1)
    ids = nearest_to(c, metric, x.mean(0))(x)  # type: ignore[arg-type]
    score = torch.cdist(x.double(), c.double()) if metric == "l2" else -x.double() @ c.double().t()
    chosen = score.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(chosen, score.min(1).values, rtol=1e-5, atol=1e-5)


def test_integer_sums_agree_with_float_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order-free sums that accelerators use, tried on the CPU."""
    x = 5 * gaussian(0, 3000, 4)
    plain = add_up(streams.RowsInMemory(x), x[:8].clone(), "l2", 0, exact_order=True)
    fixed = add_up(streams.RowsInMemory(x), x[:8].clone(), "l2", 0, exact_order=False)
    torch.testing.assert_close(fixed.sums, plain.sums, rtol=1e-12, atol=1e-6)
    assert torch.equal(fixed.counts, plain.counts) and fixed.inertia == pytest.approx(plain.inertia, rel=1e-9)


@pytest.mark.parametrize("k", [-1, 0, 1])
def test_fewer_than_two_clusters(k: int) -> None:
    with pytest.raises(InputError, match="at least 2"):
        fit_kmeans(cut(gaussian(0, 50, 2), 10), k)


def test_more_clusters_than_distinct_rows() -> None:
    x = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]).repeat(100, 1)
    with pytest.raises(InputError, match="3 among 400"):
        fit_kmeans(cut(x, 10), 4)
    assert fit_kmeans(cut(x, 10), 3).inertia < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad: float) -> None:
    x = gaussian(0, 500, 3)
    x[321, 1] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        fit_kmeans(cut(x, 100), 4)


def test_no_rows_and_rows_that_change() -> None:
    with pytest.raises(InputError, match="empty"):
        fit_kmeans(lambda: iter(()), 4)
    sizes = iter([5000, 4000, 4000])
    with pytest.raises(InputError, match="5000 at first, 4000 now"):
        fit_kmeans(lambda: iter([gaussian(0, next(sizes), 2)]), 4, sample_size=1000)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_rows_that_are_all_the_same(metric: str) -> None:
    with pytest.raises(InputError, match="no variance"):
        fit_kmeans(cut(torch.ones(500, 3), 100), 4, metric=metric)  # type: ignore[arg-type]


def test_zero_vectors_have_no_direction_and_do_no_harm() -> None:
    x = gaussian(0, 300, 4)
    x[::3] = 0
    result = fit_kmeans(cut(x, 50), 5, metric="cosine")
    assert np.isfinite(result.inertia) and torch.isfinite(result.centroids).all()
