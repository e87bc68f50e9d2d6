"""Nearest centroids are exact: against float64 brute force, on inputs made to be hard, with either product."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clustermim.tokenizers.assigning as assigning
from clustermim.tokenizers.assigning import Assigner

METRICS = ("l2", "cosine", "dot")
PRODUCTS = ("float32", "bfloat16")

# (offset, scale) of the whole problem
PLACES = {"near": (0, 1), "far": (1000, 1), "very far": (1e6, 0.1), "tiny": (0, 1e-30), "large": (0, 1e15)}


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(x: torch.Tensor, c: torch.Tensor, metric: str) -> torch.Tensor:
    """Distances from differences in float64; `argmin` gives the first of equals."""
    x, c = x.double(), c.double()
    if metric == "l2":
        return torch.cat([(part[:, None] - c).square().sum(2).argmin(1) for part in x.split(50)])
    return torch.cat([(part[:, None] * c).sum(2).argmax(1) for part in x.split(50)])


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 120),
    k=st.sampled_from([1, 2, 3, 50, 159, 160, 161, 300, 511, 1025]),
    d=st.integers(1, 24),
    place=st.sampled_from(sorted(PLACES)),
    apart=st.sampled_from([0.0, 1e-7, 1e-4, 1.0]),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 999),
)
def test_ids_equal_brute_force(n: int, k: int, d: int, place: str, apart: float, metric: str, seed: int) -> None:
    """Half of the centroids lie `apart` from the other half; rows lie among them, on them, and far outside."""
    offset, scale = PLACES[place]
    c = gaussian(seed, k, d)
    c[k // 2 :] = c[: k - k // 2] + apart * gaussian(seed + 1, k - k // 2, d)
    x = torch.cat([gaussian(seed + 2, n, d), c[:40], 0.5 * (c[:20] + c[-len(c[:20]) :]), torch.zeros(2, d)])
    x[0] *= 1e10
    x, c = offset + scale * x, offset + scale * c
    if metric == "cosine":
        c = torch.nn.functional.normalize(c, dim=1)
    want = brute_force(x, c, metric)
    for products in PRODUCTS:
        assert torch.equal(Assigner(c, metric, products)(x), want), products  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "d"), [(50, 48), (300, 192), (1000, 64)])
@pytest.mark.parametrize("metric", METRICS)
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, k: int, d: int, metric: str) -> None:
    x, c = gaussian(0, 700, d), gaussian(1, k, d)
    want = Assigner(c, metric, "float32")(x)  # type: ignore[arg-type]
    for scores, products, rows in itertools.product((1 << 12, 1 << 18), PRODUCTS, (1, 37, 700)):
        monkeypatch.setattr(assigning, "_SCORES", scores)
        nearest = Assigner(c, metric, products)  # type: ignore[arg-type]
        take = 40 if rows == 1 else 700
        assert torch.equal(torch.cat([nearest(part) for part in x[:take].split(rows)]), want[:take])


def test_whole_numbers_tie_exactly() -> None:
    """Most distances are shared by many centroids, so every candidate is weighed again; the lowest id must win."""
    c = torch.randint(-2, 3, (400, 3), generator=torch.Generator().manual_seed(0)).float()
    x = torch.randint(-3, 4, (500, 3), generator=torch.Generator().manual_seed(1)).float()
    for products in PRODUCTS:
        assert torch.equal(Assigner(c, "l2", products)(x), brute_force(x, c, "l2"))  # type: ignore[arg-type]


def test_all_centroids_alike() -> None:
    x = gaussian(0, 50, 5)
    for products, value in itertools.product(PRODUCTS, (0.0, 3.25)):
        assert (Assigner(torch.full((200, 5), value), "l2", products)(x) == 0).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_are_not_numbers_harm_no_others(metric: str) -> None:
    x, c = gaussian(0, 200, 6), gaussian(1, 300, 6)
    want = brute_force(x, c, metric)
    x[7, 2], x[50] = float("nan"), float("inf")
    want[[7, 50]] = 0
    for products in PRODUCTS:
        assert torch.equal(Assigner(c, metric, products)(x), want)  # type: ignore[arg-type]


def test_shortened_float32_products_are_allowed_for() -> None:
    x, c = gaussian(0, 300, 64), gaussian(1, 500, 64)
    want = brute_force(x, c, "l2")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(Assigner(c, "l2", "float32")(x), want)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("fast", PRODUCTS)
def test_the_stopwatch_chooses_and_changes_no_id(monkeypatch: pytest.MonkeyPatch, fast: str) -> None:
    now = [0.0]
    search = Assigner._search

    def timed(self: Assigner, block: torch.Tensor, products: str) -> torch.Tensor:
        now[0] += 0.001 if products == fast else 0.003
        return search(self, block, products)

    monkeypatch.setattr(Assigner, "_search", timed)
    monkeypatch.setattr(assigning.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(assigning, "_SCORES", 1 << 13)
    monkeypatch.setattr(assigning, "_seconds", {})
    monkeypatch.setattr(assigning, "multiplies_bfloat16", lambda: True)
    x, c = gaussian(0, 3000, 8), gaussian(1, 60, 8)
    nearest = Assigner(c)
    assert torch.equal(nearest(x), brute_force(x, c, "l2"))
    assert nearest._products == fast
    taken = next(iter(assigning._seconds.values()))
    assert all(len(seconds) == assigning._TRIALS for seconds in taken.values())
    assert torch.equal(Assigner(c)(x), nearest(x))  # and the next one need not learn it again


def test_a_processor_without_bfloat16_is_not_asked_to_imitate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assigning, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(assigning, "_seconds", {})
    x, c = gaussian(0, 3000, 8), gaussian(1, 60, 8)
    assert torch.equal(Assigner(c)(x), brute_force(x, c, "l2"))
    assert not assigning._seconds  # nothing was tried
    assert torch.equal(Assigner(c, "l2", "bfloat16")(x), Assigner(c)(x))  # who insists gets it


def test_bfloat16_that_is_slow_on_these_rows_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assigning, "_SCORES", 1 << 12)
    x, c = gaussian(0, 128 * 4 * 6, 8), gaussian(1, 300, 8)
    nearest, chosen = Assigner(c, "l2"), Assigner(c, "l2", "bfloat16")
    nearest._products = "bfloat16"  # as other rows would have it
    monkeypatch.setattr(assigning, "_seconds", {nearest._key: {"float32": [1e-12], "bfloat16": [1e-12]}})
    ids = nearest(x)
    assert nearest._products == "float32"
    assert torch.equal(ids, brute_force(x, c, "l2"))
    assert torch.equal(chosen(x), ids) and chosen._products == "bfloat16"  # what was asked for stays


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_a_gpu_gives_the_same_ids(metric: str) -> None:
    x, c = gaussian(0, 20_000, 48), gaussian(1, 1000, 48)
    want = Assigner(c, metric, "float32")(x)  # type: ignore[arg-type]
    for products in (*PRODUCTS, "auto"):
        assert torch.equal(Assigner(c.cuda(), metric, products)(x.cuda()).cpu(), want)  # type: ignore[arg-type]
