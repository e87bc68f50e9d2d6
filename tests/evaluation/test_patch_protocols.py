"""Patch protocols: mIoU against a naive count, masks cut as views are, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clustermim.data.mask_images import IGNORED, MaskImages
from clustermim.data.options import DataOptions
from clustermim.data.sources import open_splits
from clustermim.encoders.contract import Encoder, EncoderOutput
from clustermim.errors import InputError
from clustermim.evaluation import dense
from clustermim.evaluation.dense import Segmentation, evaluate_patches, mean_iou, pixel_table


class Patches(Encoder):
    """The pixels of patches of 2 × 2 as their tokens."""

    def __init__(self) -> None:
        super().__init__("patches", image_size=None, channels=1)

    def encode(self, images: torch.Tensor, which: Any) -> list[EncoderOutput]:
        tokens = torch.nn.functional.unfold(images, 2, stride=2).transpose(1, 2)
        return [EncoderOutput(cls=None, patches=tokens) for _ in which]


def make_scenes(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Grey 8 × 12 scenes of three brightnesses in blocks of 2 × 2, and the class of each pixel."""
    draws = np.random.default_rng(0)
    blocks = draws.integers(0, 3, (n, 4, 6))
    masks = blocks.repeat(2, axis=1).repeat(2, axis=2)
    images = 60 + 70 * masks + draws.integers(-15, 15, masks.shape)
    return images.astype(np.uint8), masks.astype(np.uint8)


def opened(images: np.ndarray) -> Any:
    return open_splits((images, np.arange(len(images)) % 2))


def test_what_pixels_tell_is_found_and_both_protocols_have_a_row() -> None:
    images, masks = make_scenes()
    rows = evaluate_patches(Patches(), *opened(images), masks)
    assert [row["protocol"] for row in rows] == ["patch-knn", "patch-linear"]
    for row in rows:
        assert row["miou_low"] <= row["miou"] <= row["miou_high"]
        # Brightness is the length of these tokens, which cosine similarity does not see: chance is 0.2.
        assert row["miou"] > (0.4 if row["protocol"] == "patch-knn" else 0.6)
        assert row["miou"] < row["pixel_accuracy"] and row["classes"] == 3 and row["dim"] == 4
        assert all(isinstance(value, (str, int, float)) for value in row.values())
    shuffled = masks[np.random.default_rng(1).permutation(len(masks))]
    assert all(row["miou"] < 0.35 for row in evaluate_patches(Patches(), *opened(images), shuffled))


def test_test_masks_are_read_when_all_answers_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    images, masks = make_scenes(20)
    train, test = opened(images)
    events: list[str] = []
    true_view, true_segment = MaskImages.view, dense._segment

    def view(self: MaskImages, index: int, config: Any) -> Any:
        events.append("test mask" if self._rows is test.rows else "train mask")
        return true_view(self, index, config)

    def segment(*given: Any) -> Any:
        found = true_segment(*given)
        events.append("answers")
        return found

    monkeypatch.setattr(MaskImages, "view", view)
    monkeypatch.setattr(dense, "_segment", segment)
    evaluate_patches(Patches(), train, test, masks)
    assert events == ["train mask"] * len(train) + ["answers"] + ["test mask"] * len(test)


def test_miou_equals_a_naive_count_and_ignores_what_has_no_class() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, masks = (torch.randint(4, (6, 5, 7), generator=generator) for _ in range(2))
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = IGNORED
    expected = []
    for c in range(4):
        known = masks != IGNORED
        both = ((predicted == c) & (masks == c)).sum()
        either = (((predicted == c) | (masks == c)) & known).sum()
        expected.append(float(both / either))
    figures = Segmentation(predicted).figures(masks, 4, 0)
    assert figures["miou"] == pytest.approx(np.mean(expected))
    table = pixel_table(predicted[0], masks[0], 6)
    assert mean_iou(table) == pytest.approx(mean_iou(table[:4, :4]))  # classes that are nowhere do not count


def test_masks_in_a_folder_are_those_in_an_array(tmp_path: Path) -> None:
    images, masks = make_scenes(12)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        for kind, pixels, suffix in (("images", image, "png"), ("masks", mask, "tif" if i % 2 else "png")):
            file = tmp_path / kind / f"class{i % 2}" / f"{i:02}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    options = DataOptions(image_size=8)
    train, _ = open_splits(tmp_path / "images", options)
    found = MaskImages(tmp_path / "masks", train)
    for index in range(len(train)):
        number = int(Path(train.collection.store.label_of(int(train.rows[index]))).stem)
        assert np.array_equal(found.raw(index).numpy(), masks[number])
        assert np.array_equal(found.view(index, train.view).numpy(), masks[number][:, 2:10])  # the centre
    (tmp_path / "masks/class0/00.png").unlink()
    with pytest.raises(InputError, match="have no mask"):
        for split in open_splits(tmp_path / "images", options):
            MaskImages(tmp_path / "masks", split)


def test_what_is_refused(tmp_path: Path) -> None:
    images, masks = make_scenes(10)
    train, test = opened(images)
    with pytest.raises(InputError, match="one for each of the 10 images"):
        evaluate_patches(Patches(), train, test, masks[:5])
    with pytest.raises(InputError, match="single class"):
        evaluate_patches(Patches(), train, test, masks * 0)
    with pytest.raises(InputError, match="no folder"):
        evaluate_patches(Patches(), train, test, tmp_path / "nowhere")
    np.savez(tmp_path / "m.npz", other=masks)
    with pytest.raises(InputError, match="no array 'masks'"):
        evaluate_patches(Patches(), train, test, tmp_path / "m.npz")
    from clustermim.encoders.opening import open_encoder

    with pytest.raises(InputError, match="no patches"):
        evaluate_patches(open_encoder("raw-pixels", view=train.view), train, test, masks)
