"""Pictures of predictions during pretraining: what the weights at that epoch predict, and nothing of it is changed."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from clustermim.cli import run
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.data.streaming.opening import open_images
from clustermim.data.views import eval_view
from clustermim.features.patches import make_features
from clustermim.mim.building import build_model
from clustermim.mim.model import MaskedImageModel
from clustermim.mim.picturing import SHOWN, few_images
from clustermim.mim.predicting import predict_features, predict_pixels, predict_tokens
from clustermim.mim.prediction_sheet import prediction_sheet
from clustermim.mim.watching import Watchers
from clustermim.render.sheets import Group, Tile, picture_sheet, sheet_width
from clustermim.runs import read_metrics
from clustermim.tokenizers.tokenizer import load_tokenizer
from clustermim.verbs.prediction_views import rebuild_model
from clustermim.verbs.tokenizer_fit import fit_tokenizer
from shard_samples import write_shards
from watch_samples import tensorboard

BASE = "pretrain --data digits --limit 64 --patch-size 4 --batch-size 16 --epochs 3 --device cpu --log-every 1"
BASE += " --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --checkpoint-every 3"
TIMES = ("seconds", "images_per_second", "mfu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(folder):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(folder)]


def weights(folder):
    return [(folder / name).read_bytes() for name in ("encoder.safetensors", "model.safetensors")]


def pictures(folder):
    """Name -> bytes."""
    return {file.name: file.read_bytes() for file in (folder / "pictures").iterdir()}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "k"
    fit_tokenizer("digits", k=5, patch_size=4, device="cpu", options=DataOptions(limit=64), out=folder)
    return folder


@pytest.fixture(scope="module")
def targets(tokens):
    return {
        "pixel": ["--target", "pixel"],
        "token": ["--target", "token", "--tokenizer", str(tokens)],
        "feature": ["--target", "feature", "--features", "hog"],
    }


@pytest.fixture(scope="module")
def runs(targets, tmp_path_factory):
    """Target -> (a run that nobody watches, the same with pictures)."""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in targets.items():
        assert run([*BASE.split(), *words, "--out", str(folder / name)]) == 0
        assert run([*BASE.split(), *words, "--out", str(folder / f"{name}-p"), "--picture-every", "2"]) == 0
    return {name: (folder / name, folder / f"{name}-p") for name in targets}


@pytest.mark.parametrize("name", ["pixel", "token", "feature"])
def test_they_change_nothing_and_stand_at_the_ends_of_epochs(name, runs):
    plain, watched = runs[name]
    assert rows(watched) == rows(plain) and weights(watched) == weights(plain)
    assert sorted(pictures(watched)) == ["epoch-0002.png", "epoch-0003.png"]
    for content in pictures(watched).values():
        assert Image.open(io.BytesIO(content)).size[0] >= 700


@pytest.mark.parametrize("name", ["pixel", "token", "feature"])
def test_the_last_ones_are_what_the_saved_model_predicts(name, runs, tokens):
    """Made again from the files that the run left, by the functions that `show` uses."""
    from clustermim.data.masks import random_masks

    source = open_source("digits", DataOptions(limit=64))
    held_out = open_source("digits", DataOptions(limit=64), split="test")
    places = np.linspace(0, len(held_out) - 1, SHOWN).round().astype(int)
    images = torch.stack([eval_view(held_out[int(place)][0], source.view) for place in places])
    model = rebuild_model(runs[name][1])
    assert model is not None
    mask = random_masks(0, 0, torch.as_tensor(places), model.num_patches, 0.75)
    colours = None
    if name == "pixel":
        shown = predict_pixels(model, images, mask, mean=source.view.mean, std=source.view.std, norm_pix=True)
    elif name == "token":
        shown, colours = predict_tokens(model, load_tokenizer(tokens), images, mask), np.zeros((5, 3), np.uint8)
    else:
        features = make_features("hog", patch_size=4, view=source.view)
        shown = predict_features(model, features, images, mask, standardise=False)
    names = [f"image {place}" for place in places]
    sheet = prediction_sheet(shown, names, mask_ratio=0.75, norm_pix=True, colours=colours)
    note = f"{sheet.note} The images are held out: none of them is trained on."
    again = picture_sheet(
        [Group(title="", tiles=sheet.tiles, side=160)],
        title=f"{sheet.title} after epoch 3",
        note=note,
        width=sheet_width(sheet.tiles),
    )
    found = np.asarray(Image.open(io.BytesIO(pictures(runs[name][1])["epoch-0003.png"])))
    assert found.shape == np.asarray(again).shape
    if name != "token":  # whose colours are told by other means
        assert np.array_equal(found, np.asarray(again))


def test_predicted_features_beside_the_true_ones():
    source = open_source("digits", DataOptions(limit=64))
    images = few_images(source, 3).views
    features = make_features("pixel", patch_size=4, view=source.view)

    class Right(MaskedImageModel):
        """Predicts the truth of hidden patches, and 1 beyond it."""

        def forward(self, images, mask):
            return torch.stack([f[m] for f, m in zip(features(images), mask, strict=True)]) + 1

    model, _ = build_model(
        "vit_micro", image_size=8, patch_size=4, channels=1, output_dim=16, mean=source.view.mean, std=source.view.std
    )
    model.__class__ = Right
    mask = torch.tensor([[True, False, True, True]]).expand(3, -1)
    for found in predict_features(model, features, images, mask, standardise=False):
        assert found.figure == pytest.approx(1)
        difference = found.foretold - found.described
        assert np.allclose(difference[[0, 2, 3]], 1, atol=1e-6) and (difference[1] == 0).all()


def test_images_are_held_out_where_a_split_is():
    source = open_source("digits", DataOptions(limit=64))
    few = few_images(source, 8, held_out=True)
    test = open_source("digits", DataOptions(limit=64), split="test")
    assert few.held_out and torch.equal(few.views[-1], eval_view(test[len(test) - 1][0], source.view))
    unlabelled = open_source(np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8))
    few = few_images(unlabelled, 8, held_out=True)
    assert not few.held_out and few.index.tolist() == [0, 1, 2, 3, 4]
    assert not few_images(open_source("digits#all"), 8, held_out=True).held_out


def test_loggers_get_them(runs, targets, tmp_path, works):
    pytest.importorskip("tensorboard")
    out = tmp_path / "a"
    works(*BASE.split(), *targets["pixel"], "--out", out, "--picture-every", "2", "--log", "tensorboard")
    events = tensorboard(out / "tensorboard").Images("pictures")
    assert [event.step for event in events] == [8, 12]
    logged = np.asarray(Image.open(io.BytesIO(events[-1].encoded_image_string)))
    assert np.array_equal(logged, np.asarray(Image.open(io.BytesIO(pictures(out)["epoch-0003.png"]))))


def test_a_stream_is_shown_by_the_fronts_of_its_shards(tmp_path, works):
    pattern = write_shards(tmp_path / "s", (11, 3, 9, 12, 8))
    few = few_images(open_images(pattern), 8, held_out=True)
    assert len(few.views) == 8 and not few.held_out
    fit_tokenizer(pattern, k=5, patch_size=4, device="cpu", out=tmp_path / "t")
    words = ["pretrain", "--data", pattern, "--tokenizer", tmp_path / "t", "--batch-size", "8", "--device", "cpu"]
    works(*words, "--steps", "7", "--picture-every", "1", "--out", tmp_path / "a")
    assert sorted(pictures(tmp_path / "a")) == ["epoch-0001.png", "epoch-0002.png"]  # 5 steps an epoch


def test_what_cannot_be_shown_is_refused_before_work(tmp_path, fails):
    fit_tokenizer(
        "digits", kind="identity", patch_size=4, device="cpu", options=DataOptions(limit=64), out=tmp_path / "t"
    )
    words = ["--target", "token", "--tokenizer", tmp_path / "t", "--out", tmp_path / "a"]
    assert "'identity'" in fails(*BASE.split(), *words, "--picture-every", "1")
    assert "at least 1" in fails(*BASE.split(), "--target", "pixel", "--out", tmp_path / "a", "--picture-every", "0")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_written_is_told_once_and_ends_nothing(runs, targets, tmp_path, works, fails):
    command = [*BASE.split(), *targets["pixel"], "--out", tmp_path / "a", "--picture-every", "1"]
    fails(*command, "--max-minutes", "0", code=75)
    (tmp_path / "a" / "pictures").write_text("in the way")
    said = works(*command, "--resume")
    assert said.count("Warning: the pictures failed") == 1
    assert rows(tmp_path / "a") == rows(runs["pixel"][0]) and weights(tmp_path / "a") == weights(runs["pixel"][0])


def test_a_run_directory_that_is_gone_ends_the_training_and_is_not_made_again(targets, tmp_path, fails, monkeypatch):
    look = Watchers._look

    def gone(self, due, moment):
        shutil.rmtree(tmp_path / "a")
        look(self, due, moment)

    monkeypatch.setattr(Watchers, "_look", gone)
    fails(*BASE.split(), *targets["pixel"], "--out", tmp_path / "a", "--picture-every", "1", code=4)
    assert not (tmp_path / "a" / "pictures").exists()


def test_a_sheet_ends_where_its_tiles_end():
    tiles = [Tile(picture=np.zeros((160, 500, 3), np.uint8)) for _ in range(5)]
    assert sheet_width(tiles) == 28 + 500 + 10 + 500 + 28
    assert sheet_width(tiles[:1]) == 720
    assert sheet_width([Tile(picture=np.zeros((160, 3000, 3), np.uint8))]) == 3056
