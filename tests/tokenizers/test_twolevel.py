"""Two levels: what is searched is searched exactly; more cells never find a farther centroid."""

import copy
import itertools
import pickle
import signal
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.errors import InputError, Stopped
from clustermim.tokenizers.kmeans import fit_kmeans
from clustermim.tokenizers.twolevel import TwoLevelCodebook
from clustermim.tokenizers.twolevelfit import TwoLevelResult, fit_two_levels, share_out
from clustermim.training.launch import StopRequest


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cut(x: torch.Tensor, rows: int) -> Callable[[], Iterable[torch.Tensor]]:
    return lambda: iter(torch.split(x, rows))


def squared(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return (x[:, None].double() - c.double()).square().sum(2)


def random_codebook(seed: int, sizes: list[int], dim: int, metric: str = "l2") -> TwoLevelCodebook:
    """Cells of the given sizes around random centres."""
    coarse = gaussian(seed, len(sizes), dim)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    fine = coarse[owner] + 0.7 * gaussian(seed + 1, len(owner), dim)
    fine[-1] = fine[0]  # one centroid twice, in two cells if there are two
    return TwoLevelCodebook(fine, coarse, torch.tensor([0, *sizes]).cumsum(0), metric, 1)  # type: ignore[arg-type]


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(deadline=None, max_examples=25)
@given(sizes=SIZES, dim=st.integers(1, 12), n=st.integers(0, 60), metric=st.sampled_from(["l2", "cosine"]))
def test_all_cells_find_the_nearest_of_all(sizes: list[int], dim: int, n: int, metric: str) -> None:
    book = random_codebook(3, sizes, dim, metric)
    x = torch.cat([gaussian(5, n, dim), book.centroids[:5]])
    want = (
        squared(x, book.centroids).argmin(1)
        if metric == "l2"
        else (x[:, None].double() * book.centroids.double()).sum(2).argmax(1)
    )
    assert torch.equal(book.assign(x, probes=len(sizes)), want)


@settings(deadline=None, max_examples=25)
@given(sizes=SIZES, dim=st.integers(1, 12), data=st.data())
def test_each_row_gets_the_nearest_in_its_nearest_cells(sizes: list[int], dim: int, data: st.DataObject) -> None:
    book = random_codebook(7, sizes, dim)
    probes = data.draw(st.integers(1, len(sizes)))
    x = torch.cat([gaussian(9, 50, dim), 1e6 * gaussian(9, 2, dim), torch.zeros(1, dim)])
    cells = squared(x, book.coarse).argsort(dim=1, stable=True)[:, :probes]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    searched = (owner[None, None] == cells[:, :, None]).any(1)
    want = torch.where(searched, squared(x, book.centroids), torch.inf).argmin(1)
    assert torch.equal(book.assign(x, probes), want)


def test_more_probes_never_find_a_farther_centroid() -> None:
    book, x = random_codebook(0, [30] * 20, 8), gaussian(4, 2000, 8)
    reached = [squared(x, book.centroids).gather(1, book.assign(x, p)[:, None])[:, 0] for p in (1, 2, 4, 8, 20)]
    for fewer, more in itertools.pairwise(reached):
        assert (more <= fewer).all()
    assert float(reached[-1].sum()) < float(reached[0].sum())


def test_blocks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    book, x = random_codebook(0, [5, 40, 1, 22, 13, 9], 6), gaussian(1, 500, 6)
    for probes in (1, 3):
        want = book.assign(x, probes)
        assert torch.equal(torch.cat([book.assign(part, probes) for part in x.split(17)]), want)
        assert torch.equal(book.assign(x.flip(0), probes).flip(0), want)


def test_probes_are_a_setting_and_copies_keep_it() -> None:
    book, x = random_codebook(0, [9] * 8, 4), gaussian(1, 300, 4)
    book.probes = 3
    assert torch.equal(book.assign(x), book.assign(x, 3))
    for other in (copy.deepcopy(book), pickle.loads(pickle.dumps(book))):
        assert other.probes == 3 and torch.equal(other.assign(x), book.assign(x))
    empty = TwoLevelCodebook.empty(72, 8, 4, "l2", 3)
    empty.load_state_dict(book.state_dict())
    assert torch.equal(empty.assign(x), book.assign(x))
    for bad in (0, 9):
        with pytest.raises(InputError, match="8 cells"):
            book.probes = bad
        with pytest.raises(InputError, match="8 cells"):
            book.assign(x, bad)


def test_bad_cells_are_told() -> None:
    c = gaussian(0, 6, 2)
    for offsets in ([0, 3], [0, 3, 5], [1, 3, 6], [0, 6, 6], [0, 4, 2]):
        with pytest.raises(InputError, match="do not part"):
            TwoLevelCodebook(c, c[:2], torch.tensor(offsets))
    with pytest.raises(InputError, match="l2 or cosine"):
        TwoLevelCodebook(c, c[:2], torch.tensor([0, 3, 6]), "dot")
    with pytest.raises(InputError, match="3 features"):
        TwoLevelCodebook(c, c[:2], torch.tensor([0, 3, 6])).assign(torch.ones(4, 3), 1)


@given(
    weights=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=20),
    most=st.lists(st.integers(1, 50), min_size=20, max_size=20),
    data=st.data(),
)
def test_shares_add_up_and_none_exceeds_its_most(weights: list[float], most: list[int], data: st.DataObject) -> None:
    limit = torch.tensor(most[: len(weights)])
    k = data.draw(st.integers(len(weights), int(limit.sum())))
    shares = share_out(k, torch.tensor(weights, dtype=torch.float64), limit)
    assert int(shares.sum()) == k and (shares >= 1).all() and (shares <= limit).all()
    loose = share_out(k, torch.tensor(weights, dtype=torch.float64), torch.full_like(limit, k))
    assert int(loose.sum()) == k


def fitted(x: torch.Tensor, k: int, **options: object) -> TwoLevelResult:
    return fit_two_levels(cut(x, 300), k, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_fit_is_near_plain_k_means(metric: str) -> None:
    x = gaussian(0, 2000, 4)
    result = fitted(x, 50, metric=metric)
    flat = fit_kmeans(cut(x, 300), 50, metric=metric)  # type: ignore[arg-type]
    assert result.inertia <= 1.12 * flat.inertia
    ids = result.codebook.assign(x)
    assert torch.equal(torch.bincount(ids, minlength=50), result.counts) and result.num_rows == 2000
    rows = torch.nn.functional.normalize(x, dim=1) if metric == "cosine" else x
    inertia = float((rows - result.codebook.centroids[ids]).double().square().sum())
    assert result.inertia == pytest.approx(inertia, rel=1e-6)
    first, last = result.history[0], result.history[-1]
    assert last["inertia"] < first["inertia"]  # the pass over all rows helped


def test_the_seed_decides_and_batches_do_not() -> None:
    x = gaussian(3, 1200, 5)
    runs = [fit_two_levels(cut(x, rows), 30, seed=1, sample_size=600) for rows in (37, 1200)]
    for other in runs[1:]:
        assert torch.equal(other.codebook.centroids, runs[0].codebook.centroids)
        assert torch.equal(other.codebook.coarse, runs[0].codebook.coarse)
        assert torch.equal(other.counts, runs[0].counts)
    assert not torch.equal(fitted(x, 30, seed=2).codebook.centroids, runs[0].codebook.centroids)


def test_as_many_centroids_as_distinct_rows_and_no_more() -> None:
    points = torch.stack([torch.arange(30) % 6, torch.arange(30) // 6], 1).float()
    x = torch.cat([points, points[:1].expand(3000, 2)])[
        torch.randperm(3030, generator=torch.Generator().manual_seed(0))
    ]
    result = fitted(x, 30, sample_size=60)
    assert (result.counts > 0).all() and result.inertia < 1e-6
    with pytest.raises(InputError, match="30 among 3030"):
        fitted(x, 31)


def test_bad_fits_are_told() -> None:
    x = gaussian(0, 300, 3)
    for options, told in (
        ({"k": 3}, "at least 4"),
        ({"k": 40, "cells": 1}, "2 to 20 cells"),
        ({"k": 40, "probes": 7}, "1 to 6"),
    ):
        with pytest.raises(InputError, match=told):
            fitted(x, **options)
    x[5, 1] = float("nan")
    with pytest.raises(InputError, match="NaN or infinity"):
        fitted(x, 40)
    sizes = iter([3000, 2000])
    with pytest.raises(InputError, match="3000 at first, 2000 now"):
        fit_two_levels(lambda: iter([gaussian(0, next(sizes), 2)]), 40)


def test_a_request_to_stop_is_heard() -> None:
    stop = StopRequest()
    stop.receive(signal.SIGTERM, None)
    with pytest.raises(Stopped, match="by SIGTERM"):
        fitted(gaussian(0, 300, 3), 40, stop=stop)
    stop.receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        fitted(gaussian(0, 300, 3), 40, stop=stop)
