"""Judging encoders: rows, caching, honesty about test images, chance on shuffled labels, and bad input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from clustermim.data.sources import open_splits
from clustermim.encoders.contract import Encoder, EncoderOutput
from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError
from clustermim.evaluation import protocols
from clustermim.evaluation.cache import FeatureBank, extract
from clustermim.evaluation.protocols import PROTOCOLS, evaluate, fit_judges, score, validation_rows


class Layered(Encoder):
    """Three layers of different width, that counts the images it has seen."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__("layered", image_size=None, channels=channels, depth=3)
        self.seen = 0

    def encode(self, images: Tensor, which: Sequence[int]) -> list[EncoderOutput]:
        self.seen += len(images)
        flat = images.flatten(1)
        return [EncoderOutput(cls=flat[:, : 8 * (i + 1)], patches=images.flatten(2) * (i + 1)) for i in which]


def make_images(n: int, classes: int, seed: int = 0, noise: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Grey 8 × 10 images: a pattern for each class, and noise."""
    draws = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).random((classes, 8, 10))
    labels = np.arange(n) % classes
    images = np.clip(patterns[labels] + noise * draws.standard_normal((n, 8, 10)), 0, 1)
    return (255 * images).astype(np.uint8), labels


@pytest.fixture(scope="module")
def splits() -> Any:
    return open_splits(make_images(300, 3))


def test_rows_say_everything(splits: Any) -> None:
    train, test = splits
    rows = evaluate(open_encoder("raw-pixels", view=train.view), train, test)
    assert [row["protocol"] for row in rows] == ["knn", "linear"]
    for row in rows:
        assert row["encoder"] == "raw-pixels" and row["pool"] == "pixels" and row["layer"] == 0
        assert (row["n_train"], row["n_test"], row["classes"], row["dim"]) == (len(train), len(test), 3, 80)
        assert row["top1"] > 0.9 and 0 <= row["val_top1"] <= 1
        assert all(isinstance(value, (str, int, float)) for value in row.values())
    assert rows[0]["k"] in (1, 5, 10, 20, 50) and rows[1]["weight_decay"] > 0


def test_every_layer_and_pool_gets_a_row_and_features_are_computed_once(splits: Any) -> None:
    train, test = splits
    encoder = Layered()
    rows = evaluate(encoder, train, test, layers="all", batch_size=64)
    assert len(rows) == 3 * 2 * 2 and encoder.seen == len(train) + len(test)
    assert {(row["layer"], row["pool"], row["dim"]) for row in rows} == {
        (i, pool, dim) for i in range(3) for pool, dim in (("cls", 8 * (i + 1)), ("mean", 80))
    }
    assert {row["layer"] for row in evaluate(encoder, train, test, ["knn"])} == {2}


def test_batches_change_nothing(splits: Any) -> None:
    train, test = splits
    encoder = open_encoder("random:vit_micro", view=train.view)
    first, second = (evaluate(encoder, train, test, batch_size=size) for size in (7, 256))
    for a, b in zip(first, second, strict=True):
        assert a["top1"] == pytest.approx(b["top1"], abs=0.02)
    bank = extract(encoder, protocols.make_loader(train, batch_size=32, train=False))
    with torch.no_grad():
        expected = encoder(torch.stack([train[i][0] for i in (0, 77)]).float() / 255)
    assert expected.cls is not None
    torch.testing.assert_close(bank.vectors[5, "cls"][[0, 77]], expected.cls, rtol=1e-4, atol=1e-5)


def test_test_images_are_read_once_and_after_all_choices(splits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = splits
    events: list[str] = []
    true_extract, true_score = protocols.extract, protocols.score

    def watched_extract(encoder: Any, loader: Any, *rest: Any, **more: Any) -> Any:
        events.append(f"extract {loader.source.split}")
        return true_extract(encoder, loader, *rest, **more)

    def watched_score(*rest: Any, **more: Any) -> Any:
        events.append("score")
        return true_score(*rest, **more)

    def watch(name: str) -> Any:
        def fit(*rest: Any, **more: Any) -> Any:
            events.append(f"fit {name}")
            return PROTOCOLS[name](*rest, **more)

        return fit

    watched = {name: watch(name) for name in PROTOCOLS}
    monkeypatch.setattr(protocols, "extract", watched_extract)
    monkeypatch.setattr(protocols, "score", watched_score)
    true_fit_judges = protocols.fit_judges

    def patched_fit_judges(*rest: Any, **more: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(protocols, "PROTOCOLS", watched)
            return true_fit_judges(*rest, **more)

    monkeypatch.setattr(protocols, "fit_judges", patched_fit_judges)
    evaluate(open_encoder("raw-pixels", view=train.view), train, test)
    assert events == ["extract train", "fit knn", "fit linear", "extract test", "score"]


def test_test_labels_change_no_choice_and_are_read_in_one_place(splits: Any) -> None:
    train, test = splits
    encoder = open_encoder("raw-pixels", view=train.view)
    loaders = [protocols.make_loader(s, batch_size=64, train=False) for s in (train, test)]
    bank, test_bank = (extract(encoder, loader) for loader in loaders)
    judges = fit_judges(bank, list(PROTOCOLS))
    honest = score(judges, test_bank)
    turned = score(judges, FeatureBank(test_bank.vectors, (test_bank.labels + 1) % 3, None))
    for a, b in zip(honest, turned, strict=True):
        assert b["top1"] < 0.1 < a["top1"]
        assert {k: v for k, v in a.items() if k != "top1"} == {k: v for k, v in b.items() if k != "top1"}


def test_shuffled_training_labels_give_chance() -> None:
    images, labels = make_images(600, 4)
    shuffled = np.random.default_rng(1).permutation(labels[:400])
    features = torch.from_numpy(images).flatten(1).float()
    bank = FeatureBank({(0, "x"): features[:400]}, torch.from_numpy(shuffled), None)
    rows = score(
        fit_judges(bank, list(PROTOCOLS)), FeatureBank({(0, "x"): features[400:]}, torch.from_numpy(labels[400:]), None)
    )
    low, high = binom.interval(0.999, 200, 0.25)
    for row in rows:
        assert low <= round(row["top1"] * 200) <= high, row


def test_validation_is_stratified_and_keeps_groups_whole() -> None:
    labels = torch.from_numpy(np.repeat([0, 0, 0, 1], 50))
    rows = validation_rows(labels, None, seed=0)
    assert rows.sum() == 40 and labels[rows].bincount().tolist() == [30, 10]
    assert torch.equal(rows, validation_rows(labels, None, seed=0))
    assert not torch.equal(rows, validation_rows(labels, None, seed=1))
    groups = np.arange(200) // 4
    grouped = validation_rows(labels, groups, seed=0)
    for group in np.unique(groups):
        assert grouped[torch.from_numpy(groups == group)].unique().numel() == 1
    assert 20 <= grouped.sum() <= 60


def test_colour_and_several_channels() -> None:
    draws = np.random.default_rng(0)
    for channels in (3, 5):
        labels = np.arange(60) % 2
        images = (255 * draws.random((60, 8, 8, channels)) * (0.3 + 0.7 * labels[:, None, None, None])).astype(np.uint8)
        train, test = open_splits((images, labels))
        encoder = open_encoder("random:test_resnet", view=train.view)
        assert evaluate(encoder, train, test, ["knn"])[0]["top1"] > 0.8


def test_an_encoder_of_its_own_size_gets_images_of_that_size(splits: Any) -> None:
    train, test = splits
    view = type(train.view).from_dict(train.view.to_dict() | {"image_size": (16, 24)})
    encoder = open_encoder("random:vit_micro?patch_size=8", view=view)
    assert encoder.image_size == (16, 24)
    assert evaluate(encoder, train, test, ["knn"])[0]["top1"] > 0.5


def test_bad_input_is_refused_before_any_work(splits: Any) -> None:
    train, test = splits
    encoder = Layered()
    with pytest.raises(InputError, match="Did you mean 'linear'"):
        evaluate(encoder, train, test, ["liner"])
    images, labels = make_images(60, 3)
    blank = open_splits((images, labels))[0]
    blank.labels = None
    with pytest.raises(InputError, match="no labels"):
        evaluate(encoder, blank, test)
    single = open_splits((images, labels))[0]
    single.labels = np.zeros(len(single), dtype=np.int64)
    with pytest.raises(InputError, match="single class"):
        evaluate(encoder, single, test)
    lacking = open_splits((images, labels))[0]
    lacking.labels = np.minimum(lacking.labels, 1)
    with pytest.raises(InputError, match="no image in its train split: 2"):
        evaluate(encoder, lacking, test)
    with pytest.raises(InputError, match="made for 5 channel"):
        evaluate(Layered(channels=5), train, test)
    assert encoder.seen == 0


def test_features_that_are_no_numbers_are_refused(splits: Any) -> None:
    class Broken(Layered):
        def encode(self, images: Tensor, which: Sequence[int]) -> list[EncoderOutput]:
            return [EncoderOutput(cls=images.flatten(1) / 0 * 0, patches=None) for _ in which]

    with pytest.raises(InputError, match="NaN or infinite"):
        evaluate(Broken(), *splits)


def test_nothing_to_choose_on_is_said() -> None:
    bank = FeatureBank({(0, "x"): torch.randn(3, 2)}, torch.arange(3), None)
    with pytest.raises(InputError, match="at least two images"):
        fit_judges(bank, ["knn"])
