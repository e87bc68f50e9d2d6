"""Batches of a stream do not depend on who reads: ranks, workers and resumption change nothing."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from clustermim.data.loaders import make_loader
from clustermim.data.options import DataOptions
from clustermim.data.streaming import loader as stream_loader
from clustermim.data.streaming.opening import open_images, require_labelled
from clustermim.data.streaming.order import StreamOptions
from clustermim.errors import InputError, ResourceError
from shard_samples import picture, sample, write_parquet, write_shards, write_tar

SIZES = (11, 3, 9, 12, 0, 8)  # 43 images
OPTIONS = DataOptions(flip=True)


@pytest.fixture(scope="module", params=["tar", "parquet"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write = write_shards if request.param == "tar" else write_parquet
        found = open_images(write(folder / "s", SIZES), OPTIONS, StreamOptions(lanes=4, shuffle_window=12))
    require_labelled(found, "This test")
    return found


def everything(loader, **where):
    return list(loader.epoch(**where))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


@pytest.fixture(scope="module")
def whole(source):
    return everything(make_loader(source, batch_size=8, train=True, seed=3, workers=0), epoch=2)


def test_every_image_once_with_its_label_but_the_rest(source, whole):
    index = torch.cat([batch.index for batch in whole])
    assert len(whole) == 5 and len(index.unique()) == 40 and int(index.max()) < 43
    assert torch.equal(torch.cat([batch.labels for batch in whole]), index % 3)
    loader = make_loader(source, batch_size=8, train=True, seed=3, workers=0)
    for batch, listed in zip(whole, loader.batches(2), strict=True):
        assert torch.equal(batch.index, listed)
    assert not torch.equal(everything(loader, epoch=1)[0].index, whole[0].index)


def test_views_are_those_of_any_other_source(source, whole):
    """The crop of an image is that of (seed, epoch, index), wherever the image lies."""
    pictures = np.stack([picture(number) for number in range(43)])
    loader = make_loader(open_images(pictures, OPTIONS), source.view, batch_size=1, train=True, seed=3, workers=0)
    views = {int(batch.index): batch.images[0] for batch in loader.epoch(2)}
    for batch in whole:
        for index, image in zip(batch.index.tolist(), batch.images, strict=True):
            assert torch.equal(image, views[index])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(source, whole, workers):
    loader = make_loader(source, batch_size=8, train=True, seed=3, workers=workers)
    assert_same(everything(loader, epoch=2), whole)


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (2, 2), (4, 0), (8, 0)])
def test_ranks_share_out_the_global_batch(source, whole, ranks, workers):
    sizes = {"batch_size": 8 // ranks, "train": True, "seed": 3, "workers": workers, "world_size": ranks}
    parts = [everything(make_loader(source, **sizes, rank=rank), epoch=2) for rank in range(ranks)]
    for place, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[place].index for part in parts]), batch.index)
        assert torch.equal(torch.cat([part[place].images for part in parts]), batch.images)


@pytest.mark.parametrize("start", [1, 3, 4, 5])
def test_an_epoch_goes_on_from_any_batch(source, whole, start):
    loader = make_loader(source, batch_size=8, train=True, seed=3, workers=start % 3)
    assert_same(everything(loader, epoch=2, start=start), whole[start:])


def test_an_epoch_that_goes_on_reads_a_window_a_lane_again_and_no_more(source, monkeypatch):
    read = []
    reading = type(source.shards).read

    def noted(self, shard, rows):
        for one in reading(self, shard, rows):
            read.append(one.name)
            yield one

    monkeypatch.setattr(type(source.shards), "read", noted)
    everything(make_loader(source, batch_size=8, train=True, seed=3, workers=0), epoch=2, start=4)
    window = 12 // 4
    assert len(read) <= 8 + 4 * 2 * window
    assert len(set(read)) == len(read)


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (1, 2)])
def test_without_training_every_image_once_in_order(source, workers, ranks):
    seen, images = [], []
    for rank in range(ranks):
        loader = make_loader(source, batch_size=6, train=False, workers=workers, rank=rank, world_size=ranks)
        batches = everything(loader)
        assert len(batches) == len(loader) and loader.num_images == 43
        seen += [int(index) for batch in batches for index in batch.index]
        images += [image for batch in batches for image in batch.images]
    assert seen == list(range(43))
    assert all(torch.equal(image[0], torch.from_numpy(picture(n)) / 255) for n, image in enumerate(images))


def test_other_channels_and_sizes(source):
    view = replace(source.view, channels=3, image_size=(6, 10), mean=(0.5,) * 3, std=(0.5,) * 3)
    batch = next(make_loader(source, view, batch_size=4, train=True, workers=0).epoch())
    assert batch.images.shape == (4, 3, 6, 10)


def test_what_cannot_be(source):
    with pytest.raises(InputError, match="leave out --resident"):
        make_loader(source, batch_size=4, train=True, resident=True)
    with pytest.raises(InputError, match="has 43 images, too few for a batch of 50"):
        make_loader(source, batch_size=50, train=True)


@pytest.fixture
def rotten(tmp_path, monkeypatch):
    """40 images, of which number 30 and those from 35 on were not looked at in opening, and are none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pattern = write_shards(tmp_path / "s", (20, 20))
    members = {}
    for number in range(20, 40):
        members |= sample(number) | ({f"{number:05d}.png": b"nonsense"} if number == 30 or number >= 38 else {})
    write_tar(tmp_path / "s" / "train-001.tar", members)
    monkeypatch.setattr("clustermim.data.checking.SAMPLE", 10)

    def opened(**options):
        return open_images(pattern, DataOptions(**options), StreamOptions(shuffle_window=8))

    return opened


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_told_of_once_and_stood_in_for(rotten, workers, caplog):
    loader = make_loader(rotten(), batch_size=8, train=True, workers=workers)
    with caplog.at_level(logging.WARNING):
        found = torch.cat([batch.index for batch in everything(loader)])
        everything(loader)
    assert len(found) == 40 and set(range(40)) - set(found.tolist()) == {30, 38, 39}
    assert sorted(found.tolist()) == sorted([*(set(range(40)) - {30, 38, 39}), 31, 20, 20])
    assert len(caplog.records) == 3
    assert "train-001.tar: 00030.png" in caplog.text and "not an image" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_errors_where_wished(rotten, workers):
    loader = make_loader(rotten(on_bad_image="error"), batch_size=8, train=True, workers=workers)
    with pytest.raises(InputError, match=r"train-001.tar: 000\d\d.png of .* cannot be read: not an image"):
        everything(loader)


def test_too_many_bad_images_stop_it(rotten, monkeypatch):
    monkeypatch.setattr(stream_loader, "_FEW", 10)
    monkeypatch.setattr(stream_loader, "MOST_BAD", 0.05)
    with pytest.raises(InputError, match=r"of the \d+ images read of .* are not usable, train-001.tar: 000"):
        everything(make_loader(rotten(), batch_size=4, train=False, workers=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_a_resource_error(tmp_path, monkeypatch, workers):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loader = make_loader(open_images(write_shards(tmp_path / "s", (5, 5))), batch_size=2, train=True, workers=workers)
    (tmp_path / "s" / "train-001.tar").unlink()
    with pytest.raises(ResourceError, match=r"train-001.tar cannot be read any more"):
        everything(loader)
