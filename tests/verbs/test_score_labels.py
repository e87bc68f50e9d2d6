"""`clustermim tcas` by mask images and by several classes an image: as the ids score alone, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clustermim.data.options import DataOptions
from clustermim.scoring.dense import patch_classes
from clustermim.scoring.tcas import score_tokens
from clustermim.verbs.score import tcas
from clustermim.verbs.tokenizer_fit import fit_tokenizer

SIDE, NUMBER = 8, 24


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of images whose quarters are bright or dark, masks that say which, class lists, and a tokenizer."""
    home = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    quarters = rng.integers(0, 3, (NUMBER, 2, 2))
    masks = quarters.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    images = (40 + 80 * masks + rng.integers(0, 60, masks.shape)).astype(np.uint8)
    masks[:, :2, :2] = 255
    lists = {}
    for i in range(NUMBER):
        for kind, pixels in (("images", images[i]), ("masks", masks[i])):
            file = home / kind / f"c{i % 2}" / f"{i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
        lists[f"c{i % 2}/{i:02}.png"] = [["dark", "grey", "bright"][c] for c in np.unique(quarters[i])]
    (home / "lists.json").write_text(json.dumps(lists))
    fit_tokenizer(home / "images", k=6, patch_size=2, out=home / "tokens")
    return home, images, masks, lists


def ids_of(home, images):
    from clustermim.tokenizers.tokenizer import load_tokenizer

    return load_tokenizer(home / "tokens").encode(torch.from_numpy(images)[:, None].float() / 255).numpy()


def test_masks_of_a_folder_score_as_patch_labels_do(scenes):
    home, images, masks, _ = scenes
    # Class after class, as a folder is listed.
    order = np.argsort(np.arange(NUMBER) % 2, kind="stable")
    result = tcas(home / "tokens", f"{home}/images#all", masks=home / "masks", bootstrap=10, curve=True)
    labels = patch_classes(torch.from_numpy(masks[order].astype(np.int64)), 2).numpy()
    assert (labels[:, 0] == -1).all()
    alone = score_tokens(ids_of(home, images)[order], labels, vocab_size=6, bootstrap=10)
    score = result.scores["tokens"]
    assert score.alignment_crossfit == pytest.approx(alone.alignment_crossfit, abs=1e-12)
    assert score.intervals["alignment"] == pytest.approx(alone.intervals["alignment"], abs=1e-12)
    assert score.patches == NUMBER * 15 and score.num_classes == 3 and score.alignment_crossfit > 0.3
    assert result.class_names is None and "Confused with" in result.html()
    # Arrays of all images, and another value to ignore.
    again = tcas(home / "tokens", images, masks=np.where(masks == 255, 77, masks), ignore_index=77, bootstrap=0)
    assert again.scores["tokens"].alignment == pytest.approx(score.alignment, abs=1e-12)


def test_several_classes_an_image_score_as_memberships_do(scenes):
    home, images, _, lists = scenes
    order = np.argsort(np.arange(NUMBER) % 2, kind="stable")
    names = sorted({name for found in lists.values() for name in found})
    members = np.array([[name in lists[f"c{i % 2}/{i:02}.png"] for name in names] for i in order])
    result = tcas(home / "tokens", f"{home}/images#all", multi_label=home / "lists.json", bootstrap=10)
    alone = score_tokens(ids_of(home, images)[order], members, vocab_size=6, bootstrap=10)
    score = result.scores["tokens"]
    assert score.alignment_crossfit == pytest.approx(alone.alignment_crossfit, abs=1e-12)
    assert result.class_names == tuple(names) and "bright" in result.html()
    # An image that belongs to no class is left out, and that is told.
    fewer = tcas(home / "tokens", f"{home}/images#all", multi_label=lists | {"c0/00.png": []}, bootstrap=0)
    assert fewer.scores["tokens"].images == NUMBER - 1 and "1 of 24 images belong to no class" in fewer.notes[0]


def test_both_work_on_the_command_line(scenes, works):
    home, *_ = scenes
    line = ("tcas", "--tokenizer", home / "tokens", "--data", f"{home}/images#all", "--bootstrap", 0)
    assert "3 classes of 24 images" in works(*line, "--masks", home / "masks")
    assert "3 classes of 24 images" in works(*line, "--multi-label", home / "lists.json")


def test_what_does_not_fit_is_told_on_the_command_line(scenes, fails, tmp_path):
    home, images, masks, lists = scenes
    line = ("tcas", "--tokenizer", home / "tokens", "--data", f"{home}/images#all", "--bootstrap", 0)
    assert "no folder and no .npz" in fails(*line, "--masks", tmp_path / "none")
    (tmp_path / "few").mkdir()
    assert "24 of 24 images" in fails(*line, "--masks", tmp_path / "few")
    np.savez(tmp_path / "negative.npz", masks=masks.astype(np.int16) - 1)
    assert "negative classes" in fails(*line, "--masks", tmp_path / "negative.npz")
    np.savez(tmp_path / "wide.npz", masks=masks.repeat(2, axis=2))
    assert "8 × 16 pixels, but its image c0/00.png has 8 × 8" in fails(*line, "--masks", tmp_path / "wide.npz")
    np.savez(tmp_path / "one.npz", masks=masks * 0)
    assert "class 0: token scores compare classes" in fails(*line, "--masks", tmp_path / "one.npz")
    assert "--ignore-index" in fails(*line, "--ignore-index", 3)
    assert "not both" in fails(*line, "--masks", home / "masks", "--multi-label", home / "lists.json")
    assert "stored ids" in fails("tcas", "--ids", tmp_path / "x.npz", "--masks", home / "masks")
    assert "no such file" in fails(*line, "--multi-label", tmp_path / "none.json")
    (tmp_path / "few.json").write_text(json.dumps({"c0/00.png": ["dark"]}))
    assert "does not name 23 of the 24 images" in fails(*line, "--multi-label", tmp_path / "few.json")
    (tmp_path / "empty.json").write_text(json.dumps({name: [] for name in lists}))
    assert "no class for any" in fails(*line, "--multi-label", tmp_path / "empty.json")
    fit_tokenizer(images, k=4, patch_size=4, out=tmp_path / "coarse")
    both = ("tcas", "--tokenizer", home / "tokens", tmp_path / "coarse", *line[3:])
    assert "one patch size" in fails(*both, "--masks", home / "masks")


def test_masks_of_an_unlabelled_folder_are_labels_enough_but_not_for_an_oracle(scenes, fails, tmp_path):
    home, images, *_ = scenes
    assert tcas(home / "tokens", images, masks=scenes[2], bootstrap=0).scores["tokens"].folds == 5
    np.savez(tmp_path / "x.npz", x=images)
    np.savez(tmp_path / "m.npz", masks=scenes[2])
    fit_tokenizer("digits", kind="oracle", patch_size=2, out=tmp_path / "oracle", options=DataOptions(limit=20))
    line = ("tcas", "--tokenizer", tmp_path / "oracle", "--data", tmp_path / "x.npz", "--masks", tmp_path / "m.npz")
    assert "'oracle' needs labelled images" in fails(*line)
