"""The order of an epoch over shards: every image once, near its lane's front, and nobody's number decides."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustermim.data.streaming.order import EpochOrder, StreamOptions
from clustermim.errors import InputError

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
lane_counts = st.one_of(st.none(), st.integers(1, 9))


def order_of(sizes, lanes=None, window=16, seed=0, epoch=0):
    return EpochOrder(np.array(sizes), seed, epoch, StreamOptions(lanes=lanes, shuffle_window=window))


def whole(order):
    """All images of an epoch as they are taken, by its definition."""
    lanes = [order.images(lane, 0, order.length(lane)) for lane in range(order.lanes)]
    return [int(lanes[place % order.lanes][place // order.lanes]) for place in range(order.total)]


@given(shard_sizes, lane_counts, st.integers(1, 50), st.integers(0, 3))
def test_every_image_comes_once(sizes, lanes, window, epoch):
    assert sorted(whole(order_of(sizes, lanes, window, epoch=epoch))) == list(range(sum(sizes)))


@given(shard_sizes, lane_counts, st.integers(1, 50), st.integers(1, 4), st.integers(1, 7))
def test_processes_share_out_each_global_batch(sizes, lanes, window, ranks, size):
    order = order_of(sizes, lanes, window)
    taken = whole(order)
    for first in range(0, order.total - size * ranks + 1, size * ranks):
        parts = [
            [int(i) for segment in order.share(first, size, rank, ranks) for i in order.images(*segment)]
            for rank in range(ranks)
        ]
        assert [len(part) for part in parts] == [size] * ranks
        assert sorted(chain(*parts)) == sorted(taken[first : first + size * ranks])


@given(shard_sizes, lane_counts, st.integers(1, 50))
def test_a_lane_is_read_from_the_front_and_shuffled_within_windows(sizes, lanes, window):
    order = order_of(sizes, lanes, window)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for lane in range(order.lanes):
        read = list(order.reading(lane, 0))
        assert len(read) == order.length(lane)
        for block in range(-(-len(read) // order.window)):
            assert sorted(order.block(lane, block)) == sorted(read[block * order.window :][: order.window])
            assert list(order.reading(lane, block)) == read[block * order.window :]
        shards = np.searchsorted(starts, read, side="right") - 1
        for before, after, one, other in zip(read, read[1:], shards, shards[1:], strict=False):
            assert after == before + 1 if one == other else after == starts[other]


def test_lanes_of_one_length_each_own_the_lanes_of_a_process():
    order = order_of([20] * 8, lanes=8)
    for first in range(0, 160, 16):
        for rank in range(4):
            assert [lane for lane, _, _ in order.share(first, 4, rank, 4)] == [2 * rank, 2 * rank + 1]


def test_epochs_and_seeds_differ_and_repeat():
    first = whole(order_of([50, 50, 50]))
    assert first == whole(order_of([50, 50, 50]))
    assert first != whole(order_of([50, 50, 50], epoch=1)) != whole(order_of([50, 50, 50], seed=1))
    assert {whole(order_of([50, 50, 50], lanes=1, epoch=epoch))[0] // 50 for epoch in range(20)} == {0, 1, 2}


def test_a_window_of_one_leaves_each_lane_in_the_order_of_its_files():
    order = order_of([7, 9], lanes=2, window=1)
    assert order.images(0, 0, 8).tolist() == list(order.reading(0, 0))


@pytest.mark.parametrize(("lanes", "expected"), [(None, 3), (2, 2), (100, 12)])
def test_lanes_by_default_one_a_shard_and_never_more_than_images(lanes, expected):
    assert order_of([4, 0, 4, 4], lanes).lanes == expected


def test_bad_numbers():
    with pytest.raises(InputError, match="--lanes must be at least 1, not 0"):
        StreamOptions(lanes=0)
    with pytest.raises(InputError, match="--shuffle-window must be at least 1"):
        StreamOptions(shuffle_window=0)
