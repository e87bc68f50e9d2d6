"""A second look at unchanged photos decodes none of them and finds the same; whatever changed is looked at again."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from clustermim.data import checking, readers, remembering
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "WORTH_KEEPING", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clustermim" / "looks"


@pytest.fixture
def decoded(monkeypatch):
    """How many images were decoded so far, in a list of one."""
    count, real = [0], readers.decode

    def counting(content):
        count[0] += 1
        return real(content)

    monkeypatch.setattr(readers, "decode", counting)
    return count


@pytest.fixture
def photos(tmp_path):
    """Grey and coloured photos of two classes and several sizes, one of them broken."""
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shape = (9 + number, 7) if number % 3 else (9, 7 + number, 3)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "photos" / "cat" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def facts(path, **options):
    source = open_source(f"{path}#all", DataOptions(**options))
    return source.view, len(source), source.labels.tolist(), source._findings.shapes.tolist(), source._findings.bad


def test_a_second_look_decodes_only_what_was_broken(photos, decoded, cache):
    first = facts(photos)
    assert decoded[0] >= 13 and len(list(cache.iterdir())) == 1
    decoded[0] = 0
    assert facts(photos) == first
    assert decoded[0] == 1


def test_a_zip_is_remembered_too(photos, decoded, tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as file:
        for one in sorted(photos.rglob("*.png")):
            file.write(one, one.relative_to(photos))
    first = facts(path)
    decoded[0] = 0
    assert facts(path) == first and decoded[0] == 1


@pytest.mark.parametrize("change", ["rewritten", "added", "removed"])
def test_a_change_is_noticed(photos, decoded, change, cache):
    facts(photos)
    if change == "removed":
        (photos / "cat" / "0.png").unlink()
    else:
        name = "2.png" if change == "rewritten" else "new.png"
        Image.new("RGB", (5, 6)).save(photos / "cat" / name)
    decoded[0] = 0
    changed = facts(photos)
    assert decoded[0] >= 12 and len(list(cache.iterdir())) == 1  # and the old look is not kept beside the new
    for file in cache.iterdir():
        file.unlink()
    assert facts(photos) == changed


def test_other_options_are_another_look(photos, decoded, cache):
    grey = facts(photos, channels=1)
    decoded[0] = 0
    assert facts(photos, channels=3) != grey and decoded[0] >= 12
    assert len(list(cache.iterdir())) == 2


def test_a_torn_look_and_a_home_that_takes_nothing_cost_another_look(photos, cache):
    first = facts(photos)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    assert facts(photos) == first
    for one in cache.iterdir():
        one.unlink()
    cache.rmdir()
    cache.write_text("in the way")
    assert facts(photos) == first and cache.read_text() == "in the way"


def test_few_images_are_not_worth_a_file(photos, monkeypatch, cache):
    monkeypatch.setattr(checking, "WORTH_KEEPING", remembering.WORTH_KEEPING)
    facts(photos)
    assert not cache.exists()
