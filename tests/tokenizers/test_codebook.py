"""Assignment against the naive argmin, ties, shapes of any size."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.errors import InputError
from clustermim.tokenizers.codebook import Codebook


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=15)
@given(n=st.integers(0, 400), k=st.integers(1, 1200), d=st.integers(1, 20), seed=st.integers(0, 999))
def test_l2_equals_the_naive_argmin(n: int, k: int, d: int, seed: int) -> None:
    x, c = gaussian(seed, n, d), gaussian(seed + 1, k, d)
    ids = Codebook(c).assign(x)
    assert ids.dtype == torch.int64 and ids.shape == (n,)
    if n:
        squared = torch.cdist(x.double(), c.double()).square()
        excess = squared.gather(1, ids[:, None])[:, 0] - squared.min(1).values
        # float32 leaves about 1e-7 of the squared lengths; within that, near ties may fall either way.
        assert (excess <= 1e-6 * (x.double().square().sum(1) + c.double().square().sum(1).max())).all()


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("k", [7, 700])
def test_inner_products(metric: str, k: int) -> None:
    x, c = gaussian(0, 500, 16), gaussian(1, k, 16)
    table = torch.nn.functional.normalize(c, dim=1) if metric == "cosine" else c
    assert torch.equal(Codebook(c, metric).assign(x), (x.double() @ table.double().t()).argmax(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [4, 100, 511, 512, 1000, 1025])
def test_ties_go_to_the_lower_id(k: int) -> None:
    # Whole numbers are exact in float32, so equal distances are equal. The table is one list twice.
    points = torch.randint(-4, 5, (k // 2, 3), generator=torch.Generator().manual_seed(k)).float()
    table = torch.cat([points, points, points[: k - 2 * (k // 2)]])
    x = torch.randint(-4, 5, (3000, 3), generator=torch.Generator().manual_seed(1)).float()
    assert len(table) == k
    want = (x[:, None].double() - table.double()).square().sum(2).argmin(1)  # numpy's and torch's argmin: the first
    assert torch.equal(Codebook(table).assign(x), want)
    halves = Codebook(torch.tensor([[0.0], [1.0], [0.0]]))
    assert halves.assign(torch.tensor([[0.5], [0.0], [1.0]])).tolist() == [0, 0, 1]


@pytest.mark.parametrize("k", [9, 600])
def test_far_from_the_origin_float32_still_tells_centroids_apart(k: int) -> None:
    c = gaussian(0, k, 8)
    x = c + 0.01 * gaussian(1, k, 8)
    assert torch.equal(Codebook(c + 1000).assign(x + 1000), torch.arange(k))


def test_autocast_does_not_change_the_ids() -> None:
    book, x = Codebook(gaussian(0, 300, 8)), gaussian(1, 1000, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(book.assign(x), book.assign(x.float()))
        inside = book.assign(x)
    assert torch.equal(inside, book.assign(x))


def test_new_centroids_are_noticed() -> None:
    book, x = Codebook(gaussian(0, 30, 8)), gaussian(1, 100, 8)
    book.assign(x)
    book.load_state_dict({"centroids": gaussian(2, 30, 8)})
    want = Codebook(gaussian(2, 30, 8)).assign(x)
    assert torch.equal(book.assign(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(book)).assign(x), want)
    assert torch.equal(copy.deepcopy(book).assign(x), want)


def test_distances() -> None:
    x, c = gaussian(0, 40, 5), gaussian(1, 6, 5)
    torch.testing.assert_close(Codebook(c).distances(x), torch.cdist(x, c).square(), atol=1e-4, rtol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], c[None], dim=2)
    torch.testing.assert_close(Codebook(c, "cosine").distances(x), 1 - cosine)
    torch.testing.assert_close(Codebook(c, "dot").distances(x), -(x @ c.t()))


def test_bad_tables_are_told() -> None:
    with pytest.raises(InputError, match="NaN"):
        Codebook(torch.tensor([[float("nan")]]))
    with pytest.raises(InputError, match="at least one"):
        Codebook(torch.ones(0, 3))
    with pytest.raises(InputError, match="3 features"):
        Codebook(torch.ones(2, 2)).assign(torch.ones(4, 3))
