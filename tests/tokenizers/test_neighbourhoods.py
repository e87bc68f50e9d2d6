"""Rows compared with the centroids near their homes only: against naive loops, and against looking at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.tokenizers import neighbourhoods
from clustermim.tokenizers.kmeans import fit_kmeans
from clustermim.tokenizers.nearest import FitMetric, nearest_to
from clustermim.tokenizers.neighbourhoods import Neighbourhoods
from clustermim.tokenizers.streams import RowsInMemory

METRICS = st.sampled_from(["l2", "cosine"])


def made(seed: int, rows: int, k: int, metric: FitMetric) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, centroids, and centroids that moved a little; float64, so that no tie is decided by rounding."""
    generator = torch.Generator().manual_seed(seed)
    x, c, step = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (rows, k, k))
    moved = c + 0.2 * step
    if metric == "cosine":
        x, c, moved = (torch.nn.functional.normalize(v) for v in (x + 0.5, c, moved))
    return (
        x + (100.0 if metric == "l2" else 0.0),
        c + (100.0 if metric == "l2" else 0.0),
        moved + 100.0 * (metric == "l2"),
    )


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 700), st.integers(64, 90), METRICS)
def test_rows_go_to_the_best_of_the_centroids_listed_for_their_home(
    seed: int, rows: int, k: int, metric: FitMetric
) -> None:
    x, c, moved = made(seed, rows, k, metric)
    near = Neighbourhoods(x)
    first, then = near.assign(c, metric), near.assign(moved, metric)
    for i, row in enumerate(x):
        distance = (row - c).square().sum(1)
        assert distance[first[i]] <= distance.min() * (1 + 1e-9)
        home = c[first[i]]
        listed = (home - moved).square().sum(1).argsort()[: neighbourhoods.LISTED]
        distance = (row - moved[listed]).square().sum(1)
        assert (row - moved[then[i]]).square().sum() <= distance.min() * (1 + 1e-9)
        assert int(then[i]) in listed.tolist()


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 700), METRICS)
def test_where_lists_hold_all_centroids_nothing_is_missed(seed: int, rows: int, metric: FitMetric) -> None:
    x, c, moved = made(seed, rows, neighbourhoods.LISTED, metric)
    near = Neighbourhoods(x)
    near.assign(c, metric)
    assert torch.equal(near.assign(moved, metric), nearest_to(moved, metric, x.mean(0))(x))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_fit_is_as_good_as_one_that_looks_at_all_centroids(
    metric: FitMetric, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40_000, 2, generator=generator) @ torch.randn(2, 12, generator=generator)
    x = x.sin() + 0.05 * torch.randn(40_000, 12, generator=generator)

    def fit() -> float:
        return fit_kmeans(lambda: iter(x.split(4000)), 256, metric=metric, sample_size=30_000).inertia

    used = []
    with monkeypatch.context() as patch:
        assign = Neighbourhoods.assign
        patch.setattr(Neighbourhoods, "assign", lambda *a: used.append(1) or assign(*a))
        near = fit()
    assert used
    monkeypatch.setattr(Neighbourhoods, "pay", staticmethod(lambda data, k: False))
    assert near <= 1.003 * fit()


@pytest.mark.parametrize(("rows", "k", "pays"), [(100_000, 1000, True), (100_000, 1001, False), (100_000, 255, False)])
def test_it_is_used_where_it_pays(rows: int, k: int, pays: bool) -> None:
    assert Neighbourhoods.pay(RowsInMemory(torch.zeros(rows, 1)), k) == pays
