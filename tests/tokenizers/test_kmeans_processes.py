"""K-means over several processes, and K-means that was killed: the same centroids as in one piece."""

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import clustermim.tokenizers.kmeans as kmeans
import clustermim.tokenizers.streams as streams
from clustermim.errors import InputError, Stopped
from clustermim.features.moments import Spread
from clustermim.tokenizers.kmeans import KMeansResult, fit_kmeans
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import StopRequest
from forking import in_group, in_process

N, K, HOW = 3001, 9, {"seed": 1, "sample_size": 900, "tol": 0.0, "max_passes": 10}


def rows(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few rows take the whole road: starts, growing parts of a sample, full passes."""
    monkeypatch.setattr(streams, "BLOCK", 256)
    monkeypatch.setattr(kmeans, "_START_ROWS", 300)


def fit_part(x: torch.Tensor, rank: int, size: int, **how: Any) -> KMeansResult:
    first, last = N * rank // size, N * (rank + 1) // size
    return fit_kmeans(lambda: iter(x[first:last].split(100)), K, first_row=first, **(HOW | how))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_two_processes_find_the_centroids_of_one(tmp_path: Path, metric: str) -> None:
    one = fit_part(rows(), 0, 1, metric=metric)
    found = in_group(lambda rank: fit_part(rows(), rank, 2, metric=metric), 2, tmp_path)
    assert torch.equal(found[0].centroids, found[1].centroids)
    torch.testing.assert_close(found[0].centroids, one.centroids, rtol=0.0, atol=1e-8)
    assert torch.equal(found[0].counts, one.counts) and found[0].num_rows == N
    assert found[0].inertia == pytest.approx(one.inertia, rel=1e-10)
    assert [step["rows"] for step in found[0].history] == [step["rows"] for step in one.history]
    assert any(step["stage"] == "sample" for step in one.history)


def test_processes_seek_distinct_and_far_rows_together(tmp_path: Path) -> None:
    x = torch.zeros(N, 2, dtype=torch.float64)
    x[::500] = torch.arange(7.0, dtype=torch.float64)[:, None] + 1
    how = {"sample_size": 20}
    one = fit_kmeans(lambda: iter([x]), 8, **how)  # type: ignore[arg-type]

    def part(rank: int) -> KMeansResult:
        first, last = N * rank // 2, N * (rank + 1) // 2
        return fit_kmeans(lambda: iter([x[first:last]]), 8, first_row=first, **how)  # type: ignore[arg-type]

    found = in_group(part, 2, tmp_path)
    assert one.inertia < 1e-9 and found[0].inertia < 1e-9
    assert torch.equal(found[0].centroids.sort(0).values, one.centroids.sort(0).values)


def test_bad_rows_of_one_process_end_all(tmp_path: Path) -> None:
    def part(rank: int) -> str:
        x = rows()
        x[2500] = float("nan")
        with pytest.raises(InputError) as error:
            fit_part(x, rank, 2)
        return str(error.value)

    first, second = in_group(part, 2, tmp_path)
    assert "Another process" in first and "NaN" in second


def test_variances_of_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    x = torch.cat([rows(), torch.ones(N, 1, dtype=torch.float64), torch.arange(N)[:, None].double() // (N // 2)], 1)

    def spread(parts: torch.Tensor) -> dict[str, Any]:
        found = Spread(7, len(parts))
        found.add(parts)
        found.share()
        return found.facts()

    one = spread(x)
    found = in_group(lambda rank: spread(x[: N // 2] if rank == 0 else x[N // 2 :]), 2, tmp_path)
    assert found[0] == found[1] and found[0]["constant_dimensions"] == one["constant_dimensions"] == [5]
    assert found[0]["feature_variance"] == pytest.approx(one["feature_variance"], rel=1e-3)


class Killer:
    """Blocks that end their process by a signal in a given pass."""

    def __init__(self, number: int, how: signal.Signals | None) -> None:
        self.passes, self.number, self.how = 0, number, how

    def __call__(self) -> Iterator[torch.Tensor]:
        self.passes += 1
        for place, part in enumerate(rows(torch.float32).split(300)):
            if self.passes == self.number and place == 5 and self.how is not None:
                os.kill(os.getpid(), self.how)
            yield part


@pytest.mark.parametrize("killed_in", [1, 2, 6])
def test_a_killed_fit_goes_on_bit_for_bit(tmp_path: Path, killed_in: int) -> None:
    whole = fit_kmeans(Killer(0, None), K, **HOW)  # type: ignore[arg-type]
    fit = functools.partial(fit_kmeans, k=K, **HOW)  # type: ignore[arg-type]
    code = in_process(lambda: fit(Killer(killed_in, signal.SIGKILL), checkpoints=Checkpoints(tmp_path)))
    assert code == -signal.SIGKILL
    blocks = Killer(0, None)
    again = fit(blocks, checkpoints=Checkpoints(tmp_path))
    assert torch.equal(again.centroids, whole.centroids) and torch.equal(again.counts, whole.counts)
    assert (again.inertia, again.history, again.starts) == (whole.inertia, whole.history, whole.starts)
    if killed_in == 6:  # one pass to sample and four whole ones were not made again
        assert blocks.passes == len([step for step in whole.history if step["stage"] == "full"]) - 4


def test_a_fit_in_memory_goes_on_too(tmp_path: Path) -> None:
    fit = functools.partial(fit_kmeans, k=K, seed=1)
    stop = StopRequest()
    kept = Checkpoints(tmp_path)
    save, kept.save = kept.save, lambda step, state: (step == 6 and stop.receive(15, None), save(step, state))[1]  # type: ignore[method-assign,func-returns-value]
    with pytest.raises(Stopped, match=r"SIGTERM in full pass 3.*--resume"):
        fit(Killer(0, None), checkpoints=kept, stop=stop)
    assert torch.equal(
        fit(Killer(0, None), checkpoints=Checkpoints(tmp_path)).centroids, fit(Killer(0, None)).centroids
    )


def test_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    fit = functools.partial(fit_kmeans, k=K, seed=1)
    stop = StopRequest()
    stop.receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        fit(lambda: iter([rows()]), checkpoints=Checkpoints(tmp_path), stop=stop)
    assert not Checkpoints(tmp_path).paths()
    in_process(lambda: fit(Killer(3, signal.SIGKILL), checkpoints=Checkpoints(tmp_path), sample_size=500))
    assert Checkpoints(tmp_path).paths()
    with pytest.raises(InputError, match="3001"):
        fit(lambda: iter([rows(torch.float32)[:2000]]), checkpoints=Checkpoints(tmp_path), sample_size=500)
