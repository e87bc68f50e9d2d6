"""Every protocol through the same properties: rows, honesty about test labels, chance on shuffled labels, bad input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from clustermim.data.loaders import make_loader
from clustermim.data.sources import open_splits
from clustermim.encoders.contract import Encoder, EncoderOutput
from clustermim.encoders.opening import open_encoder
from clustermim.errors import InputError
from clustermim.evaluation import evaluating
from clustermim.evaluation.cache import FeatureCache, extract, fingerprint
from clustermim.evaluation.evaluating import Setting, evaluate, fit_judges
from clustermim.evaluation.protocols import PROTOCOLS, ProtocolOptions, validation_rows
from clustermim.evaluation.sealing import Sealed

QUICK = ProtocolOptions(shots=(1, 5), draws=3, probe_epochs=4)
"""Enough to see that everything runs."""


ON_IMAGES = [name for name, entry in PROTOCOLS.items() if not entry.on_masks]
"""Those that judge patches by masks go through the like in test_dense."""


class Layered(Encoder):
    """Three layers of different width, that counts the images it has seen."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__("layered", image_size=None, channels=channels, depth=3)
        self.count = {"seen": 0}  # no setting, so no part of its fingerprint

    @property
    def seen(self) -> int:
        return self.count["seen"]

    def encode(self, images: Tensor, which: Sequence[int]) -> list[EncoderOutput]:
        self.count["seen"] += len(images)
        flat = images.flatten(1)
        patches = images.flatten(2).transpose(1, 2).reshape(len(images), 10, 8)
        return [EncoderOutput(cls=flat[:, : 8 * (i + 1)], patches=patches * (i + 1)) for i in which]


def make_images(n: int, classes: int, seed: int = 0, noise: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Grey 8 × 10 images: a pattern for each class, and noise."""
    draws = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).random((classes, 8, 10))
    labels = np.arange(n) % classes
    images = np.clip(patterns[labels] + noise * draws.standard_normal((n, 8, 10)), 0, 1)
    return (255 * images).astype(np.uint8), labels


def quiet_splits(data: Any) -> Any:
    """Without crops and flips, which would destroy these patterns."""
    from clustermim.data.options import DataOptions

    return open_splits(data, DataOptions(flip=False, crop_scale=(0.9, 1.0)))


@pytest.fixture(scope="module")
def splits() -> Any:
    return quiet_splits(make_images(300, 3))


def figure(row: dict[str, Any]) -> float:
    return float(row[PROTOCOLS[row["protocol"]].metric])


@pytest.mark.parametrize("protocol", ON_IMAGES)
def test_rows_say_everything_and_classes_are_found(splits: Any, protocol: str) -> None:
    train, test = splits
    learning = ProtocolOptions(shots=(1, 5), draws=3, probe_epochs=20)
    rows = evaluate(open_encoder("raw-pixels", view=train.view), train, test, [protocol], learning)
    assert len(rows) == (2 if protocol == "fewshot" else 1)
    for row in rows:
        assert row["encoder"] == "raw-pixels" and row["layer"] == 0 and row["protocol"] == protocol
        assert row["pool"] == ("attention" if protocol == "attentive" else "pixels")
        assert (row["n_train"], row["n_test"], row["classes"], row["dim"]) == (len(train), len(test), 3, 80)
        # Patterns are told apart by everything, but by LARS only after more epochs: see test_linear_mae.
        assert protocol == "linear-mae" or figure(row) > (0.6 if protocol == "retrieval" else 0.85), row
        metric = PROTOCOLS[protocol].metric
        assert row[f"{metric}_low"] <= figure(row) <= row[f"{metric}_high"]
        matrix = row.pop("confusion", None)
        assert all(isinstance(value, (str, int, float)) for value in row.values())
        if matrix is not None:
            assert np.sum(matrix) == len(test) and np.trace(matrix) == round(row["top1"] * len(test))
            assert row["balanced"] == pytest.approx((np.diag(matrix) / np.sum(matrix, axis=1)).mean())


@pytest.mark.parametrize("protocol", ON_IMAGES)
def test_shuffled_training_labels_give_chance(protocol: str) -> None:
    """With labels shuffled in train, accuracy on true test labels lies in the 99.9 % band of chance."""
    # Much noise: where a class is one tight cluster, its test images stand or fall together, which is not binomial.
    train, test = quiet_splits(make_images(400, 4, noise=1.5))
    encoder = open_encoder("raw-pixels", view=train.view)
    honest = evaluate(encoder, train, test, [protocol], QUICK)
    train.labels = np.random.default_rng(3).permutation(train.labels)
    rows = evaluate(encoder, train, test, [protocol], QUICK)
    if PROTOCOLS[protocol].labels == "none":
        assert rows == honest  # it has never looked at them
        return
    low, high = binom.interval(0.999, len(test), 0.25)
    for row in rows:
        assert low <= round(figure(row) * len(test)) <= high, row


@pytest.mark.parametrize("protocol", ON_IMAGES)
def test_test_labels_are_read_once_when_all_answers_stand(
    splits: Any, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = splits
    sealed = Sealed(train, test)
    assert sealed.images.labels is None and sealed.images[0][1] is None and sealed.images.classes is None
    events: list[str] = []
    encoder = open_encoder("raw-pixels", view=train.view)

    def watch(module: Any, name: str) -> None:
        true = getattr(module, name)

        def told(*given: Any, **more: Any) -> Any:
            result = true(*given, **more)
            events.append(name)
            return result

        monkeypatch.setattr(module, name, told)

    for name in ("fit_judges", "ask"):
        watch(evaluating, name)

    class Source:
        """Stands where the labelled test images were: any attribute that is read is written down."""

        def __getattr__(self, name: str) -> Any:
            events.append(f"read {name}")
            return getattr(test, name)

    sealed._source = Source()  # type: ignore[assignment]
    evaluate(encoder, train, sealed, [protocol], QUICK)
    assert events == ["fit_judges", "ask", "read labels", "read groups"]


def test_test_labels_change_no_choice(splits: Any) -> None:
    train, test = splits
    encoder = open_encoder("raw-pixels", view=train.view)
    names = ["knn", "linear", "fewshot"]
    honest = evaluate(encoder, train, test, names, QUICK)
    turned_test = open_splits(make_images(300, 3))[1]
    turned_test.labels = (turned_test.labels + 1) % 3
    turned = evaluate(encoder, train, turned_test, names, QUICK)
    for a, b in zip(honest, turned, strict=True):
        assert b["top1"] < 0.15 < a["top1"]
        chosen = {"k", "weight_decay", "val_top1", "iterations"}
        assert {k: a[k] for k in chosen & set(a)} == {k: b[k] for k in chosen & set(b)}


def test_every_layer_and_pool_gets_a_row_and_features_are_computed_once(splits: Any) -> None:
    train, test = splits
    encoder = Layered()
    rows = evaluate(encoder, train, test, setting=Setting(layers="all", batch_size=64))
    assert len(rows) == 3 * 2 * 2 and encoder.seen == len(train) + len(test)
    assert {(row["layer"], row["pool"], row["dim"]) for row in rows} == {
        (i, pool, dim) for i in range(3) for pool, dim in (("cls", 8 * (i + 1)), ("mean", 8))
    }
    assert {row["layer"] for row in evaluate(encoder, train, test, ["knn"])} == {2}
    trained = evaluate(encoder, train, test, ["linear-mae", "attentive"], ProtocolOptions(probe_epochs=1))
    assert [(row["protocol"], row["pool"]) for row in trained] == [
        ("attentive", "attention"),
        ("linear-mae", "cls"),
        ("linear-mae", "mean"),
    ]


def test_batches_change_nothing(splits: Any) -> None:
    train, test = splits
    encoder = open_encoder("random:vit_micro", view=train.view)
    first, second = (evaluate(encoder, train, test, setting=Setting(batch_size=size)) for size in (7, 256))
    for a, b in zip(first, second, strict=True):
        assert a["top1"] == pytest.approx(b["top1"], abs=0.02)
    vectors = extract(encoder, make_loader(train, batch_size=32, train=False))
    with torch.no_grad():
        expected = encoder(torch.stack([train[i][0] for i in (0, 77)]).float() / 255)
    assert expected.cls is not None
    torch.testing.assert_close(vectors[5, "cls"][[0, 77]], expected.cls, rtol=1e-4, atol=1e-5)


def test_features_on_disk_are_taken_for_what_they_were_made_of_and_nothing_else(splits: Any, tmp_path: Any) -> None:
    train, test = splits
    encoder, cache = Layered(), FeatureCache(tmp_path)
    first = evaluate(encoder, train, test, ["knn"], setting=Setting(cache=cache))
    seen = encoder.seen
    again = evaluate(encoder, train, test, ["knn", "retrieval"], setting=Setting(cache=cache, batch_size=9))
    assert encoder.seen == seen and [row for row in again if row["protocol"] == "knn"] == first
    assert len(list(tmp_path.iterdir())) == 2
    evaluate(encoder, train, test, ["knn"], setting=Setting(cache=cache, layers="all"))
    assert encoder.seen > seen
    files = set(tmp_path.iterdir())
    other = quiet_splits(make_images(300, 3, seed=1))
    evaluate(encoder, *other, ["knn"], setting=Setting(cache=cache))
    assert len(set(tmp_path.iterdir()) - files) == 2


def test_a_fingerprint_knows_weights_and_settings_but_no_names(splits: Any) -> None:
    train, _ = splits

    def opened(spec: str) -> Encoder:
        return open_encoder(spec, view=train.view)

    same = opened("random:vit_micro")
    same.name = "other"
    assert fingerprint(same) == fingerprint(opened("random:vit_micro"))
    different = [opened("random:vit_micro?seed=1"), opened("raw-pixels"), opened("random:vit_micro")]
    with torch.no_grad():
        next(different[2].parameters())[0] += 1e-6
    assert len({fingerprint(e) for e in (same, *different)}) == 4


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
    with pytest.raises(InputError, match="give --masks"):
        evaluate(encoder, train, test, ["knn", "patch-knn"])
    with pytest.raises(InputError, match="nothing to judge by"):
        evaluate(encoder, train, test, [])
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
    few = open_splits(make_images(24, 3))[0]
    with pytest.raises(InputError, match=r"10 images a class is not possible: class '0' has 6 .* use --shots 1 2 5"):
        evaluate(encoder, few, test, ["fewshot"])
    with pytest.raises(InputError, match="at least 2 draws"):
        evaluate(encoder, train, test, ["fewshot"], ProtocolOptions(draws=1))
    with pytest.raises(InputError, match="--probe-epochs"):
        ProtocolOptions(probe_epochs=0)
    assert encoder.seen == 0


def test_features_that_are_no_numbers_are_refused(splits: Any) -> None:
    class Broken(Layered):
        def encode(self, images: Tensor, which: Sequence[int]) -> list[EncoderOutput]:
            return [EncoderOutput(cls=images.flatten(1) / 0 * 0, patches=None) for _ in which]

    with pytest.raises(InputError, match="NaN or infinite"):
        evaluate(Broken(), *splits)


def test_nothing_to_choose_on_is_said(splits: Any) -> None:
    few = open_splits(make_images(6, 3))[0]
    few.labels = np.arange(len(few))
    with pytest.raises(InputError, match="at least two images"):
        fit_judges({(0, "x"): torch.randn(len(few), 2)}, few, ["knn"])
