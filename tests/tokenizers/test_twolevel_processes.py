"""K-means on two levels over several processes, and one that was killed: the same centroids as in one piece."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clustermim.errors import InputError, Stopped
from clustermim.tokenizers.twolevelfit import TwoLevelResult, fit_two_levels
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import StopRequest
from forking import in_group, in_process

N, K = 3001, 60


def rows() -> torch.Tensor:
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(0))


def fit(blocks: Any, **how: Any) -> TwoLevelResult:
    return fit_two_levels(blocks, K, seed=1, sample_size=1200, refinements=2, **how)


class Killer:
    """Blocks that end their process by a signal in a given pass."""

    def __init__(self, number: int = 0) -> None:
        self.passes, self.number = 0, number

    def __call__(self) -> Iterator[torch.Tensor]:
        self.passes += 1
        for place, part in enumerate(rows().split(300)):
            if self.passes == self.number and place == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            yield part


def same(one: TwoLevelResult, other: TwoLevelResult) -> bool:
    return (
        torch.equal(one.codebook.centroids, other.codebook.centroids)
        and torch.equal(one.codebook.coarse, other.codebook.coarse)
        and torch.equal(one.codebook.offsets, other.codebook.offsets)
        and torch.equal(one.counts, other.counts)
        and (one.inertia, one.history) == (other.inertia, other.history)
    )


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_two_processes_find_the_centroids_of_one(tmp_path: Path, metric: str) -> None:
    def part(rank: int, size: int) -> TwoLevelResult:
        first, last = N * rank // size, N * (rank + 1) // size
        return fit(lambda: iter(rows()[first:last].split(100)), first_row=first, metric=metric)

    one = part(0, 1)
    found = in_group(lambda rank: part(rank, 2), 2, tmp_path)
    assert same(found[0], found[1])
    torch.testing.assert_close(found[0].codebook.centroids, one.codebook.centroids, rtol=0.0, atol=1e-6)
    assert torch.equal(found[0].counts, one.counts) and found[0].num_rows == N
    assert found[0].inertia == pytest.approx(one.inertia, rel=1e-6)


@pytest.mark.parametrize("killed_in", [1, 2, 3, 4])
def test_a_killed_fit_goes_on_bit_for_bit(tmp_path: Path, killed_in: int) -> None:
    whole = fit(Killer())
    assert len(whole.history) == 3
    code = in_process(lambda: fit(Killer(killed_in), checkpoints=Checkpoints(tmp_path)))
    assert code == -signal.SIGKILL
    blocks = Killer()
    assert same(fit(blocks, checkpoints=Checkpoints(tmp_path)), whole)
    assert blocks.passes == 4 - max(killed_in - 1, 0)  # what was whole is not made again


def test_a_stop_keeps_what_was_done_and_other_data_are_refused(tmp_path: Path) -> None:
    stop, kept = StopRequest(), Checkpoints(tmp_path)
    save, kept.save = kept.save, lambda step, state: (stop.receive(15, None), save(step, state))[1]  # type: ignore[method-assign]
    with pytest.raises(Stopped, match=r"by SIGTERM.*--resume"):
        fit(Killer(), checkpoints=kept, stop=stop)
    with pytest.raises(InputError, match="3001 at first, 2000 now"):
        fit(lambda: iter([rows()[:2000]]), checkpoints=Checkpoints(tmp_path))
    assert same(fit(Killer(), checkpoints=Checkpoints(tmp_path)), fit(Killer()))
