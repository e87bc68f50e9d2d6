"""What `datasets` streams: kinds of files, splits and columns; what cannot be told beforehand is refused."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, load_dataset
from PIL import Image

from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source, open_splits
from clustermim.data.streaming.opening import open_images, require_labelled
from clustermim.errors import InputError, ResourceError
from shard_samples import picture, png, write_parquet


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows_of(source, index=None):
    found = source.read(range(len(source)) if index is None else index)
    return [(number, source.decoded(number, one).pixels.numpy()[0], one.label) for number, one in found]


def assert_pictures(source, count, labelled=True):
    found = rows_of(source)
    assert [number for number, _, _ in found] == list(range(count))
    assert all(np.array_equal(pixels, picture(number)) for number, pixels, _ in found)
    assert [label for _, _, label in found] == [number % 3 if labelled else None for number in range(count)]


def test_parquet(tmp_path):
    source = open_images(write_parquet(tmp_path / "p", (5, 7, 2)))
    assert source.counts.tolist() == [5, 7, 2] and source.split == "train" and source.shards.local
    assert_pictures(source, 14)
    assert [number for number, _, _ in rows_of(source, [2, 6, 11, 13, 0])] == [2, 6, 11, 13, 0]
    assert len(open_images(f"hf-stream:{tmp_path}/p/train-001.parquet")) == 7


def test_arrow_as_datasets_saves_it(tmp_path):
    images = [Image.fromarray(picture(number)) for number in range(9)]
    data = Dataset.from_dict({"image": images, "label": [number % 3 for number in range(9)]})
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    source = open_images(f"hf-stream:{tmp_path}/saved")
    assert source.counts.tolist() == [5, 4]
    assert_pictures(source, 9)


def test_json_that_names_files(tmp_path):
    lines = []
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        lines.append(json.dumps({"file_name": f"{number}.png", "label": number % 3}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    assert_pictures(open_images(f"hf-stream:{tmp_path}"), 5)


def test_plain_bytes_and_labels_that_are_text(tmp_path):
    table = pyarrow.table({"picture": [png(0), png(1)], "label": ["cat", "dog"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = open_images(f"hf-stream:{tmp_path}")
    assert_pictures(source, 2, labelled=False)
    with pytest.raises(InputError, match="a table in a column 'label' of whole numbers"):
        require_labelled(source, "An oracle")


def test_splits_are_told_by_names(tmp_path):
    write_parquet(tmp_path, (3,))
    (tmp_path / "train-000.parquet").rename(tmp_path / "validation-000.parquet")
    write_parquet(tmp_path, (5,))
    assert len(open_images(f"hf-stream:{tmp_path}")) == 5
    assert len(open_images(f"hf-stream:{tmp_path}?split=val")) == 3
    with pytest.raises(InputError, match=r"has no split 'trian'. Did you mean 'train'\?"):
        open_images(f"hf-stream:{tmp_path}?split=trian")
    with pytest.raises(InputError, match="unknown key 'spilt'"):
        open_images(f"hf-stream:{tmp_path}?spilt=val")


def test_an_empty_cell_is_a_bad_image(tmp_path):
    cells = [{"bytes": png(n), "path": None} for n in range(40)] + [{"bytes": None, "path": "gone.png"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "a.parquet")
    source = open_images(f"hf-stream:{tmp_path}")
    assert source.skipped == [("a.parquet: row 40", "an empty file")]
    with pytest.raises(InputError, match=r"a.parquet: row 40"):
        open_images(f"hf-stream:{tmp_path}", DataOptions(on_bad_image="error"))


def test_broken_files_and_other_folders_are_refused(tmp_path):
    pattern = write_parquet(tmp_path / "p", (3, 3))
    source = open_images(pattern)
    (tmp_path / "p" / "train-001.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"train-001.parquet cannot be read"):
        open_images(pattern)
    with pytest.raises(ResourceError, match=r"train-001.parquet of hf-stream:.* cannot be read any more"):
        rows_of(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"\.parquet, \.arrow, \.jsonl, \.json can be streamed"):
        open_images(f"hf-stream:{tmp_path}/empty")
    with pytest.raises(InputError, match="neither a file or folder here nor a data set of the hub"):
        open_images(f"hf-stream:{tmp_path}/nowhere/at/all")
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "empty" / "a.parquet")
    with pytest.raises(InputError, match="has no column of images"):
        open_images(f"hf-stream:{tmp_path}/empty")


def test_a_data_set_of_the_hub_without_a_network_is_an_input_error():
    with pytest.raises(InputError, match=r"hf-stream:nobody/nothing\?split=train cannot be read"):
        open_images("hf-stream:nobody/nothing?split=train")
    with pytest.raises(InputError, match=r"hf-stream:owner/name.split=train"):
        open_images("hf-stream:nobody/nothing:train")


def test_a_streaming_data_set_in_python_is_told_how_it_is_named(tmp_path):
    write_parquet(tmp_path, (3,))
    data = load_dataset("parquet", data_files=[str(tmp_path / "train-000.parquet")], split="train", streaming=True)
    with pytest.raises(InputError, match=r"IterableDataset does not say how many images it has.*hf-stream:FOLDER"):
        open_images(data)
    for opener in (open_source, open_splits):
        with pytest.raises(InputError, match="is read from the front"):
            opener(f"hf-stream:{tmp_path}")
