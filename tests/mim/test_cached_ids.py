"""Ids that are kept are the ids that would be computed: same losses, same weights, one question an image."""

import numpy as np
import pytest
import torch

from clustermim.cli import run
from clustermim.data.loaders import make_loader
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.mim.cached_ids import CachedIds
from clustermim.mim.targets import TokenTarget
from clustermim.runs import read_metrics
from clustermim.tokenizers.clustered import KMeansTokenizer
from clustermim.tokenizers.fitting import fit
from clustermim.tokenizers.tokenizer import Tokenizer

FIXED = DataOptions(limit=53, flip=False, crop_scale=(1.0, 1.0))
RUN = "pretrain --data digits --limit 53 --target token --batch-size 16 --epochs 4 --device cpu --log-every 1"
RUN += " --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --checkpoint-every 2"
FIXED_VIEWS = ["--no-flip", "--crop-scale", "1", "1"]


class Counting(KMeansTokenizer):
    """Notes how many images it was asked about."""

    asked = 0

    def tokens(self, images, index, labels):
        self.asked += len(images)
        return super().tokens(images, index, labels)


def counting(k=7, side=4):
    made = fit(open_source("digits", FIXED), patch_size=side, k=k)
    return Counting(made.config, made.features, made.codebook)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokens") / "k7"
    fit(open_source("digits", FIXED), patch_size=4, k=7).save_pretrained(made)
    return made


@pytest.mark.parametrize("workers", [None, 0])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_image_is_asked_about_once_by_each_process(workers, ranks):
    source = open_source("digits", FIXED)
    for rank in range(ranks):
        tokenizer, met = counting(), set()
        loader = make_loader(source, batch_size=16, train=True, workers=workers, rank=rank, world_size=ranks)
        target = TokenTarget(tokenizer)
        assert "once an image" in target.keep_what_repeats(loader, None)
        for epoch in range(4):
            for batch in loader.epoch(epoch, start=epoch == 0):  # as a resumed run begins
                ids = target.cache.encode(batch.images, batch.keys)
                expected = super(Counting, tokenizer).tokens(batch.images, None, None)
                assert torch.equal(ids, expected)
                met |= set(batch.index.tolist())
        assert tokenizer.asked == len(met) <= 53


def test_ids_of_images_without_a_key_are_computed_each_time():
    tokenizer = counting(k=300, side=2)
    source = open_source("digits", FIXED)
    images = torch.stack([source[i][0] for i in range(6)])
    cache = CachedIds(tokenizer, 53, 16)
    assert cache.ids.dtype == np.uint16
    for keys, asked in (([0, -1, 2, -1, 4, 5], 6), ([0, 1, 2, -1, 4, 5], 2), ([0, 1, 2, 3, 4, 5], 1)):
        tokenizer.asked = 0
        assert torch.equal(
            cache.encode(images, torch.tensor(keys)), super(Counting, tokenizer).tokens(images, None, None)
        )
        assert tokenizer.asked == asked


@pytest.mark.parametrize(
    ("options", "wanted", "kept"),
    [
        ({}, None, True),
        ({}, False, False),
        ({"flip": True}, None, False),
        ({"crop_scale": (0.8, 1.0)}, None, False),
    ],
)
def test_what_is_kept(options, wanted, kept):
    view = DataOptions(**{"flip": False, "crop_scale": (1.0, 1.0), "limit": 53} | options)
    loader = make_loader(open_source("digits", view), batch_size=16, train=True)
    target = TokenTarget(counting())
    assert bool(target.keep_what_repeats(loader, wanted)) is kept
    assert (target.cache is not None) is kept


def test_only_exact_ids_are_kept_unasked():
    source = open_source("digits", FIXED)
    loader = make_loader(source, batch_size=16, train=True)
    whitened = fit(source, patch_size=4, k=5, features="pixel?whiten=true")
    assert not whitened.batch_invariant
    for wanted, kept in ((None, False), (True, True)):
        target = TokenTarget(whitened)
        target.keep_what_repeats(loader, wanted)
        assert (target.cache is not None) is kept
    soft = TokenTarget(counting(), soft=0.5)
    assert soft.keep_what_repeats(loader, None) == "" and soft.cache is None


def test_losses_are_the_same_to_the_bit_also_resumed(folder, tmp_path, monkeypatch, works):
    asked = []
    encode = Tokenizer.encode

    def noting(self, images, **beside):
        asked.append(len(images))
        return encode(self, images, **beside)

    monkeypatch.setattr(Tokenizer, "encode", noting)
    found = {}
    for name, more in (("kept", []), ("computed", ["--no-cache-ids"])):
        asked.clear()
        told = works(*RUN.split(), "--tokenizer", folder, *FIXED_VIEWS, *more, "--out", tmp_path / name)
        assert ("ids are computed once an image" in told) is (name == "kept")
        found[name] = sum(asked)
    assert found["computed"] == 4 * 48 and found["kept"] <= 53
    for expected in (75, 75, 0):
        command = [*RUN.split(), "--tokenizer", str(folder), *FIXED_VIEWS, "--out", str(tmp_path / "parts"), "--resume"]
        assert run(command + (["--max-minutes", "0"] if expected else [])) == expected
    rows = [[(row["step"], row["loss"]) for row in read_metrics(tmp_path / name)] for name in (*found, "parts")]
    assert rows[0] == rows[1] == rows[2]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in (*found, "parts")]
    assert weights[0] == weights[1] == weights[2]


def test_what_cannot_be_kept_is_refused(folder, tmp_path, fails):
    base = [*RUN.split(), "--tokenizer", folder, "--out", tmp_path / "a", "--cache-ids"]
    assert "--no-flip --crop-scale 1 1" in fails(*base)
    assert "--soft-targets" in fails(*base, *FIXED_VIEWS, "--soft-targets", "0.5")
    pixels = [word if word != "token" else "pixel" for word in RUN.split()]
    assert "--cache-ids is for --target token" in fails(*pixels, "--out", tmp_path / "a", "--cache-ids")
    assert not (tmp_path / "a").exists()
