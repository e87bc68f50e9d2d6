"""webdataset shards: what patterns name, what members make an image, and what broken files are told of."""

import gzip
import json

import fsspec
import numpy as np
import pytest

from clustermim.data.loaders import make_loader
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.data.streaming import tars
from clustermim.data.streaming.opening import open_images, require_labelled
from clustermim.data.streaming.order import StreamOptions
from clustermim.data.streaming.tars import expand_braces
from clustermim.errors import InputError, ResourceError
from shard_samples import picture, png, sample, write_shards, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{b,a}/{1..2}", ["b/1", "b/2", "a/1", "a/2"]),
        ("x{a,b{1..2}}", ["xa", "xb1", "xa", "xb2"]),
    ],
)
def test_braces_as_a_shell_expands_them(pattern, expected):
    assert sorted(expand_braces(pattern)) == sorted(expected) if "b{" in pattern else expand_braces(pattern) == expected


def rows_of(source, index=None):
    found = source.read(range(len(source)) if index is None else index)
    return [(number, source.decoded(number, one).pixels.numpy()[0], one.label) for number, one in found]


@pytest.mark.parametrize("form", ["braces", "glob", "folder", "joined"])
def test_all_ways_to_name_shards(tmp_path, form):
    pattern = write_shards(tmp_path / "s", (3, 2, 4))
    folder = tmp_path / "s"
    joined = "::".join(f"{folder}/train-00{n}.tar" for n in range(3))
    name = {"braces": pattern, "glob": f"wds:{folder}/tr*-*.tar", "folder": f"wds:{folder}", "joined": f"wds:{joined}"}
    source = open_images(name[form])
    assert source.counts.tolist() == [3, 2, 4] and source.skipped == [] and source.labelled
    assert source.view.image_size == (8, 8) and source.channels == 1
    for number, pixels, label in rows_of(source):
        assert np.array_equal(pixels, picture(number)) and label == number % 3


def test_images_by_number_may_jump(tmp_path):
    source = open_images(write_shards(tmp_path, (3, 2, 4)))
    assert [number for number, _, _ in rows_of(source, [1, 2, 7, 8, 3, 0])] == [1, 2, 7, 8, 3, 0]
    assert all(np.array_equal(pixels, picture(number)) for number, pixels, _ in rows_of(source, [1, 2, 7, 8, 3, 0]))


def test_what_makes_a_sample(tmp_path):
    members = {
        "notes.txt": b"not an image",
        "a/1.seg.png": png(5),
        "a/1.PNG": png(1),
        "a/1.cls": b"7\n",
        "a/1.jpg": b"a second image of the sample is not taken",
        "a/2.json": b"{}",
        "b.c/3.png": png(3),
        "._3.png": b"of a file system",
        "b.c/3.cls": b"0",
    }
    source = open_images(f"wds:{write_tar(tmp_path / 'x.tar', members)}")
    (_, first, label), (_, second, other) = rows_of(source)
    assert np.array_equal(first, picture(1)) and np.array_equal(second, picture(3)) and (label, other) == (7, 0)


def test_no_labels(tmp_path):
    source = open_images(write_shards(tmp_path, (3,), labelled=False))
    assert not source.labelled and [label for _, _, label in rows_of(source)] == [None] * 3


def test_an_image_that_is_none_is_stood_in_for_by_the_next_of_its_shard(tmp_path):
    members = sample(0) | {"00001.png": b"nonsense"} | sample(2) | {"00003.png": png(3)[:-30]}
    write_tar(tmp_path / "a.tar", members)
    write_shards(tmp_path, (40,))
    source = open_images(f"wds:{tmp_path}")
    assert [name for name, _ in source.skipped] == ["a.tar: 00001.png", "a.tar: 00003.png"]
    assert "a.tar: 00001.png (not an image)" in source.skipped_message()
    found = [source.decoded(number, one) for number, one in source.read(range(4))]
    assert [one.number for one in found] == [0, 2, 2, 0]
    assert [one.unfit and one.unfit[0] for one in found] == [None, "a.tar: 00001.png", None, "a.tar: 00003.png"]
    assert all(np.array_equal(one.pixels[0], picture(one.number)) for one in found)
    with pytest.raises(InputError, match=r"2 of the 44 files .*a.tar: 00001.png \(not an image\)"):
        open_images(f"wds:{tmp_path}", DataOptions(on_bad_image="error"))


def test_a_shard_of_nothing_but_bad_images_is_named(tmp_path):
    write_shards(tmp_path, (40,))
    write_tar(tmp_path / "a.tar", {"1.png": b"x", "2.png": b"y"})
    source = open_images(f"wds:{tmp_path}")
    with pytest.raises(InputError, match=r"a\.tar of wds:.* has no image that can be read, a.tar: 1.png"):
        rows_of(source, [0])


def test_a_truncated_shard_gives_what_is_whole_and_is_told_of(tmp_path):
    pattern = write_shards(tmp_path, (9, 3))
    path = tmp_path / "train-001.tar"
    whole = path.read_bytes()
    for size in range(0, len(whole) - 512, 512 + 297):
        path.write_bytes(whole[:size])
        source = open_images(pattern)
        (name, reason), found = source.skipped[0], int(source.counts[1])
        assert name == "train-001.tar" and reason
        assert [number for number, _, _ in rows_of(source)] == list(range(9 + found))
    assert found == 3  # of which only the mark at the end is missing
    with pytest.raises(InputError, match=r"train-001.tar \(cut short or damaged after"):
        open_images(pattern, DataOptions(on_bad_image="error"))


def test_empty_compressed_and_other_files_are_told_of(tmp_path):
    pattern = write_shards(tmp_path, (9, 9, 9, 3))
    (tmp_path / "train-000.tar").write_bytes(b"")
    (tmp_path / "train-001.tar").write_bytes(gzip.compress((tmp_path / "train-001.tar").read_bytes()))
    write_tar(tmp_path / "train-002.tar", {"a.txt": b"x"})
    with pytest.raises(InputError, match=r"3 of the 6 files .*empty file.*compressed as a whole.*holds no images"):
        open_images(pattern)
    with pytest.raises(InputError, match=r"train-002.tar holds no images: train-002.tar \(holds no images\)"):
        open_images(f"wds:{tmp_path}/train-002.tar")


def test_patterns_that_name_nothing(tmp_path):
    write_shards(tmp_path, (2, 2))
    with pytest.raises(InputError, match=r"2 of the 4 shards .* do not exist, .*train-002.tar for one.*from train-000"):
        open_images(f"wds:{tmp_path}/train-{{000..003}}.tar")
    with pytest.raises(InputError, match=r"no file is called .*test-\*\.tar.*there are 2, from train-000.tar"):
        open_images(f"wds:{tmp_path}/test-*.tar")
    with pytest.raises(InputError, match=r"There is no folder .*nowhere"):
        open_images(f"wds:{tmp_path}/nowhere/{{0..1}}.tar")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"there are no \.tar files in"):
        open_images(f"wds:{tmp_path}/none")
    with pytest.raises(InputError, match="cannot be continued in the middle"):
        open_images("wds:pipe:curl https://example.org/a.tar")
    with pytest.raises(InputError, match="Leave out #train"):
        open_images(f"wds:{tmp_path}#train")
    with pytest.raises(InputError, match="--group"):
        open_images(f"wds:{tmp_path}", DataOptions(group="folder"))


def test_counts_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path / "s", (3, 2))
    assert len(open_images(pattern)) == 5
    counting = tars._count
    monkeypatch.setattr(tars, "_count", lambda path: pytest.fail("counted again"))
    assert len(open_images(pattern)) == 5
    monkeypatch.setattr(tars, "_count", counting)
    write_shards(tmp_path / "s", (3, 4))
    assert len(open_images(pattern)) == 7


def test_the_fingerprint_tells_other_shards_apart_and_knows_no_folders(tmp_path):
    prints = {
        open_images(write_shards(tmp_path / name, sizes), DataOptions(limit=limit)).fingerprint()
        for name, sizes, limit in [("a", (3, 2), None), ("b", (3, 2), None), ("c", (2, 3), None), ("d", (3, 2), 4)]
    }
    assert len(prints) == 3


@pytest.mark.parametrize(("limit", "expected"), [(1, [0, 0, 1]), (5, [2, 1, 2]), (7, [3, 1, 3]), (11, [6, 1, 4])])
def test_a_limit_takes_from_the_front_of_every_shard(tmp_path, limit, expected):
    source = open_images(write_shards(tmp_path, (9, 1, 4)), DataOptions(limit=limit))
    assert len(source) == limit and sorted(source.counts.tolist()) == sorted(expected)
    assert len(rows_of(source)) == limit


def test_a_shard_that_changes_or_vanishes_later_is_named(tmp_path):
    source = open_images(write_shards(tmp_path, (3, 5)))
    write_shards(tmp_path, (3, 4))
    with pytest.raises(InputError, match=r"train-001.tar has 4 images, but image 4 of it is needed"):
        rows_of(source)
    (tmp_path / "train-001.tar").unlink()
    with pytest.raises(ResourceError, match=r"train-001.tar cannot be read any more: .*No such file"):
        rows_of(source)


def test_labels_are_asked_for_or_do_no_harm(tmp_path):
    write_tar(tmp_path / "a.tar", sample(0) | {"1.png": png(1), "1.cls": b"cat"})
    source = open_images(f"wds:{tmp_path}/a.tar")
    loader = make_loader(source, batch_size=2, train=False, workers=0)
    assert next(loader.epoch()).labels is None
    require_labelled(source, "An oracle")
    with pytest.raises(InputError, match=r"a.tar: 1.png of .* has no label that is a whole number"):
        next(loader.epoch())
    write_tar(tmp_path / "b.tar", sample(0, labelled=False))
    with pytest.raises(InputError, match=r"An oracle needs labelled images"):
        require_labelled(open_images(f"wds:{tmp_path}/b.tar"), "An oracle")


@pytest.mark.parametrize("listed", ["sizes.json", "_info.json"])
def test_shards_elsewhere_need_a_list_of_sizes(tmp_path, listed):
    write_shards(tmp_path, (3, 2))
    there = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        there.pipe(f"/{listed}/{path.name}", path.read_bytes())
    pattern = f"wds:memory://{listed}/train-{{000..001}}.tar"
    with pytest.raises(InputError, match=r"must be known beforehand.*Put a sizes.json beside the shards"):
        open_images(pattern)
    sizes = {"train-000.tar": 3, "train-001.tar": 2}
    splits = {"train": {"filenames": list(sizes), "shard_lengths": list(sizes.values())}}
    there.pipe(f"/{listed}/{listed}", json.dumps(sizes if listed == "sizes.json" else {"splits": splits}).encode())
    source = open_images(pattern)
    assert not source.shards.local
    assert all(np.array_equal(pixels, picture(number)) for number, pixels, _ in rows_of(source))
    there.pipe(f"/{listed}/{listed}", json.dumps({"train-000.tar": 3}).encode())
    with pytest.raises(InputError, match=r"says nothing of memory://.*train-001.tar \(1 of 2"):
        open_images(pattern)
    with pytest.raises(InputError, match=r"nosuch://a/sizes.json cannot be opened: .*nosuch"):
        open_images("wds:nosuch://a/{0..1}.tar")


def test_what_takes_images_in_any_order_refuses_streams_and_options_of_streams_are_for_streams(tmp_path):
    pattern = write_shards(tmp_path, (3,))
    with pytest.raises(InputError, match=r"is read from the front.*Leave the prefix out"):
        open_source(pattern)
    with pytest.raises(InputError, match="--lanes and --shuffle-window are for streams"):
        open_images("digits", stream=StreamOptions(lanes=3))
