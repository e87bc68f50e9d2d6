"""Both loaders give the same batches, and how an epoch is cut up changes nothing."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from clustermim.data import kept_views, loaders
from clustermim.data.loaders import ResidentLoader, WorkerLoader, make_loader
from clustermim.data.masks import block_masks, random_masks
from clustermim.data.sources import open_source
from clustermim.errors import InputError, ResourceError

PIXELS = np.random.default_rng(0).integers(0, 256, (53, 12, 17, 3), dtype=np.uint8)
LABELS = np.arange(53) % 4


@pytest.fixture(scope="module")
def source():
    return open_source((PIXELS, LABELS), split="all")


def everything(loader, **where):
    return list(loader.epoch(**where))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [(12, 17), (8, 8), (20, 16)])
def test_worker_and_resident_loaders_agree(source, train, size):
    view = replace(source.view, image_size=size)
    resident = make_loader(source, view, batch_size=8, train=train, seed=3)
    workers = make_loader(source, view, batch_size=8, train=train, seed=3, workers=0)
    assert isinstance(resident, ResidentLoader) and isinstance(workers, WorkerLoader)
    ours, theirs = everything(resident, epoch=2), everything(workers, epoch=2)
    assert len(ours) == len(theirs) == len(resident) == len(workers) == (6 if train else 7)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.labels, torch.from_numpy(LABELS)[one.index])
        assert one.images.shape == (len(one.index), 3, *size) and one.images.dtype == torch.float32
        assert torch.allclose(one.images, other.images, atol=1e-4)


def uneven_images(folder, count=11):
    generator = np.random.default_rng(1)
    for number in range(count):
        pixels = generator.integers(0, 256, (9 + number % 3, 10 + number % 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return open_source(folder)


def test_views_that_never_change_are_read_once(tmp_path, monkeypatch):
    source = uneven_images(tmp_path)
    view, reads = replace(source.view, image_size=(8, 8)), []
    options = {"batch_size": 4, "train": False}
    plain = everything(make_loader(source, view, workers=0, **options))
    monkeypatch.setattr(loaders, "min", lambda *_: 0, raising=False)  # no reading processes: reads are counted here
    read = type(source).__getitem__
    monkeypatch.setattr(type(source), "__getitem__", lambda self, index: reads.append(index) or read(self, index))
    loader = make_loader(source, view, **options)
    first, second = everything(loader, epoch=0), everything(loader, epoch=1)
    assert sorted(reads) == list(range(11))
    third = everything(make_loader(source, view, batch_size=3, train=False), start=1)  # another loader, other batches
    assert len(reads) == 11
    assert torch.equal(torch.cat([b.images for b in third]), torch.cat([b.images for b in plain])[3:])
    for ours in (first, second):
        for one, other in zip(ours, plain, strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.index, other.index)
            assert torch.equal(one.keys, other.keys) and (one.labels is None) == (other.labels is None)
    part = open_source(source, split="all")  # another part of the same images
    assert len(everything(make_loader(part, view, **options))) == 3 and len(reads) == 11
    first[0].images.zero_()  # a batch is the reader's own
    assert torch.equal(everything(loader)[0].images, plain[0].images)
    reads.clear()
    everything(make_loader(source, replace(view, image_size=(6, 6)), **options))
    assert len(reads) == 11  # other views are read anew
    reads.clear()
    everything(make_loader(source, view, train=False, batch_size=4, crops=True))
    everything(make_loader(source, view, train=False, batch_size=4, crops=True))
    assert len(reads) == 22  # crops differ from epoch to epoch


def test_views_are_not_kept_where_memory_is_short_or_workers_are_asked_for(tmp_path, monkeypatch):
    source = uneven_images(tmp_path)
    options = {"batch_size": 4, "train": False}
    everything(make_loader(source, workers=0, **options))
    assert kept_views._kept.get(source.collection.store) is None
    monkeypatch.setattr(loaders, "free_memory", lambda device: 1000)
    everything(make_loader(source, **options))
    assert kept_views._kept.get(source.collection.store) is None


def test_processes_change_nothing(source):
    alone = everything(make_loader(source, batch_size=8, train=True, workers=0), epoch=1, start=3)
    helped = everything(make_loader(source, batch_size=8, train=True, workers=2), epoch=1, start=3)
    assert len(alone) == len(helped) == 3
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.images, other.images)


@pytest.mark.parametrize("workers", [None, 0])
def test_start_skips_batches(source, workers):
    loader = make_loader(source, batch_size=8, train=True, seed=5, workers=workers)
    whole, rest = everything(loader, epoch=4), everything(loader, epoch=4, start=2)
    assert len(rest) == len(whole) - 2
    for one, other in zip(whole[2:], rest, strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.images, other.images)
    assert everything(loader, epoch=4, start=6) == []


def test_ranks_share_out_the_global_batch(source):
    whole = everything(make_loader(source, batch_size=12, train=True, seed=5), epoch=1)
    parts = [
        everything(make_loader(source, batch_size=4, train=True, seed=5, rank=rank, world_size=3), epoch=1)
        for rank in range(3)
    ]
    assert [len(part) for part in parts] == [len(whole)] * 3
    for place, batch in enumerate(whole):
        assert torch.equal(batch.index, torch.cat([part[place].index for part in parts]))
        assert torch.allclose(batch.images, torch.cat([part[place].images for part in parts]), atol=1e-6)


def test_views_do_not_depend_on_the_batch_size(source):
    def by_index(batch_size):
        batches = everything(make_loader(source, batch_size=batch_size, train=True, seed=1), epoch=0)
        return {int(index): image for batch in batches for index, image in zip(batch.index, batch.images, strict=True)}

    small, large = by_index(2), by_index(26)
    assert len(large) == 52
    for index in large.keys() & small.keys():
        assert torch.allclose(small[index], large[index], atol=1e-6)


def test_epochs_and_seeds_differ(source):
    def first(seed, epoch):
        return next(make_loader(source, batch_size=50, train=True, seed=seed).epoch(epoch))

    a, b, c = first(0, 0), first(0, 1), first(1, 0)
    assert not torch.equal(a.index, b.index) and not torch.equal(a.index, c.index)
    assert not torch.equal(a.images[a.index.argsort()][:5], b.images[b.index.argsort()][:5])


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_eval_sees_every_image_once_in_order(source, world_size):
    seen = []
    for rank in range(world_size):
        loader = make_loader(source, batch_size=7, train=False, rank=rank, world_size=world_size)
        batches = everything(loader)
        assert len(batches) == len(loader) and loader.num_images == 53
        seen += [int(index) for batch in batches for index in batch.index]
    assert seen == list(range(53))


def test_resident_images_stay_uint8_and_are_kept(source):
    loader = make_loader(source, batch_size=8, train=True)
    assert loader.images.dtype == torch.uint8
    assert make_loader(source, batch_size=4, train=False).images is loader.images


def test_uneven_images_go_to_workers(tmp_path):
    for number in range(6):
        Image.new("L", (8 + number, 9)).save(tmp_path / f"{number}.png")
    uneven = open_source(tmp_path)
    loader = make_loader(uneven, replace(uneven.view, image_size=(8, 8)), batch_size=3, train=True, workers=0)
    assert isinstance(loader, WorkerLoader) and next(loader.epoch()).images.shape == (3, 1, 8, 8)
    with pytest.raises(InputError, match=r"cannot be kept in memory as one block"):
        make_loader(uneven, batch_size=3, train=True, resident=True)


def test_a_view_may_ask_for_other_channels(source):
    view = replace(source.view, channels=1, mean=(0.5,), std=(0.5,))
    resident = next(make_loader(source, view, batch_size=5, train=False).epoch())
    workers = next(make_loader(source, view, batch_size=5, train=False, workers=0).epoch())
    assert resident.images.shape[1] == 1 and torch.allclose(resident.images, workers.images)


def test_deep_images_are_resident_as_floats():
    deep = open_source((np.random.default_rng(0).random((30, 6, 6)) * 65535).astype(np.uint16))
    loader = make_loader(deep, batch_size=30, train=False)
    assert loader.images.dtype == torch.float32
    assert torch.equal(next(loader.epoch()).images[3], deep[3][0])


class Deadly(Dataset):
    """Kills the process that reads it, unless that is the one that made it."""

    def __init__(self):
        self.home = os.getpid()

    def __len__(self):
        return 20

    def __getitem__(self, place):
        if os.getpid() != self.home:
            os._exit(9)
        return np.zeros((4, 4), np.uint8)


def test_a_worker_that_dies_is_a_resource_error():
    loader = make_loader(open_source(Deadly()), batch_size=4, train=False, workers=1)
    with pytest.raises(ResourceError, match=r"A process that reads images died.*--workers 0"):
        everything(loader)


class Rotten(Deadly):
    """Unreadable from its second reading on."""

    def __init__(self):
        super().__init__()
        self.rotten = False

    def __getitem__(self, place):
        if self.rotten and place == 7:
            raise OSError("gone")
        return np.zeros((4, 4), np.uint8)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_named_without_a_traceback(workers):
    data = Rotten()
    loader = make_loader(open_source(data), batch_size=4, train=False, workers=workers)
    data.rotten = True
    with pytest.raises(InputError, match=r"item 7 of Rotten cannot be read: .*gone") as caught:
        everything(loader)
    assert "Traceback" not in str(caught.value)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_batches(source):
    view = replace(source.view, image_size=(8, 8))
    here = everything(make_loader(source, view, batch_size=8, train=True, seed=3), epoch=2)
    there = everything(make_loader(source, view, batch_size=8, train=True, seed=3, device="cuda"), epoch=2)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.index, other.index.cpu()) and torch.equal(one.labels, other.labels.cpu())
        assert torch.allclose(one.images, other.images.cpu(), atol=1e-4)
        index = other.index
        assert torch.equal(random_masks(1, 2, one.index, 49, 0.6), random_masks(1, 2, index, 49, 0.6).cpu())
        assert torch.equal(block_masks(1, 2, one.index, (7, 7), 0.4), block_masks(1, 2, index, (7, 7), 0.4).cpu())


def test_readers_leave_a_signal_to_the_whole_group_to_the_main_process(source):
    loader = make_loader(source, batch_size=4, train=False, workers=1)
    batches = loader.epoch()
    next(batches)
    (reader,) = multiprocessing.active_children()
    for name in ("SIGINT", "SIGUSR1", "SIGHUP", "SIGTERM"):
        os.kill(reader.pid, getattr(signal, name))
    assert sum(len(batch.index) for batch in batches) == len(source) - 4
    batches = loader.epoch()
    next(batches)
    (reader,) = multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="Terminated"):  # torch raises it from a handler, wherever we are
        for _ in range(2):
            os.kill(reader.pid, signal.SIGTERM)
            time.sleep(0.1)
        list(batches)


@pytest.mark.parametrize("workers", [None, 0])
@pytest.mark.parametrize(
    ("train", "changes", "kept"),
    [
        (False, {}, True),
        (True, {}, False),
        (True, {"flip": False, "crop_scale": (1.0, 1.0)}, False),  # of 12 × 17 pixels crops may differ
        (True, {"flip": False, "crop_scale": (1.0, 1.0), "crop_ratio": (17 / 12, 17 / 12)}, True),
    ],
)
def test_keys_are_those_of_views_that_never_change(source, workers, train, changes, kept):
    view = replace(source.view, **changes)
    loader = make_loader(source, view, batch_size=8, train=train, workers=workers)
    assert loader.repeats(12, 17) is kept
    seen = {}
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            assert torch.equal(batch.keys, batch.index if kept else torch.full_like(batch.index, -1))
            for key, image in zip(batch.keys.tolist(), batch.images, strict=True):
                assert key < 0 or torch.equal(seen.setdefault(key, image), image)
