"""The label-free proxy against loops, and at both ends of its scale."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.errors import InputError
from clustermim.scoring.agreement import AgreementCounts, token_agreement


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**16))
def test_agreement_equals_loops_over_patches(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 5, (6, 4)), rng.integers(0, 5, (6, 3))
    got = token_agreement(torch.from_numpy(first), torch.from_numpy(second), 5)

    def excess(inside, outside):
        return (np.mean(inside) - np.mean(outside)) / (1 - np.mean(outside))

    same = [a == b for x in range(6) for a in first[x] for b in second[x]]
    apart = [a == b for x in range(6) for y in range(6) if x != y for a in first[x] for b in second[y]]
    assert got.view_agreement == pytest.approx(excess(same, apart))
    same = [first[x, i] == first[x, j] for x in range(6) for i in range(4) for j in range(4) if i != j]
    apart = [a == b for x in range(6) for y in range(6) if x != y for a in first[x] for b in first[y]]
    assert got.patch_agreement == pytest.approx(excess(same, apart))


def test_the_scale_runs_from_chance_to_one_token_an_image():
    own = torch.arange(50)[:, None].expand(50, 8)
    best = token_agreement(own, own)
    assert best.view_agreement == best.patch_agreement == pytest.approx(1) and best.images == 50
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 20, (2, 400, 16)))
    chance = token_agreement(noise[0], noise[1])
    assert abs(chance.view_agreement) < 0.01 and abs(chance.patch_agreement) < 0.01
    assert token_agreement(own * 0, own * 0).view_agreement == 0


def test_only_images_seen_twice_count_and_bad_streams_are_refused():
    counts = AgreementCounts(4, 3)
    with pytest.raises(InputError, match="never counted"):
        counts.agreement()
    counts.update(0, torch.tensor([[0, 1], [2, 2], [1, 1]]), torch.tensor([0, 1, 2]))
    counts.update(1, torch.tensor([[0, 1]]), torch.tensor([1]))
    with pytest.raises(InputError, match="at least two images"):
        counts.agreement()
    counts.update(1, torch.tensor([[0, 1], [1, 2]]), torch.tensor([2, 3]))
    assert counts.agreement().images == 2
    with pytest.raises(InputError, match="tokens outside"):
        counts.update(0, torch.tensor([[3]]), torch.tensor([3]))
    with pytest.raises(InputError, match="images outside"):
        counts.update(0, torch.tensor([[1]]), torch.tensor([4]))
