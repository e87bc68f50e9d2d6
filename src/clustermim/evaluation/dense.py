"""Patch protocols on mask images: the class of each patch by k-NN or logistic regression, judged pixel by pixel.

What a patch token says by itself, with no decoder: each training patch has the commonest class of its pixels; scores of
the test patches are interpolated to the pixels of the view. Mean intersection over union (mIoU) over the classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from clustermim.data.counted import Stream, counter_hash
from clustermim.data.loaders import Loader, make_loader
from clustermim.data.mask_images import IGNORED, MaskImages
from clustermim.data.sources import ImageSource
from clustermim.data.splits import hold_out
from clustermim.encoders.contract import Encoder
from clustermim.errors import InputError
from clustermim.evaluation.cache import chosen_layers
from clustermim.evaluation.evaluating import DEFAULT_OPTIONS, DEFAULT_SETTING, Setting, view_for
from clustermim.evaluation.judging import Figures, Scores, Truth
from clustermim.evaluation.knn import fit_knn
from clustermim.evaluation.linear import fit_linear
from clustermim.evaluation.protocols import VALIDATION_FRACTION, ProtocolOptions
from clustermim.scoring.dense import patch_classes

DENSE: dict[str, Callable[[Tensor, Tensor, int, Tensor], Any]] = {"patch-knn": fit_knn, "patch-linear": fit_linear}
PATCHES = 100_000
"""Training patches at most, as many of each image: k-NN keeps them, the regression is fitted to them."""


@dataclass(frozen=True)
class Segmentation:
    """The class of each pixel of the test views."""

    predicted: Int64[Tensor, "m h w"]

    def figures(
        self, masks: Int64[Tensor, "m h w"], num_classes: int, seed: int, groups: np.ndarray | None = None
    ) -> Figures:
        """`miou` with its bootstrap interval over images or groups, `pixel_accuracy`."""
        tables = torch.stack(
            [pixel_table(found, mask, num_classes) for found, mask in zip(self.predicted, masks, strict=True)]
        )
        whole = tables.sum(dim=0)
        truth = Truth(torch.zeros(len(masks), dtype=torch.int64), groups, 1, seed)
        drawn = torch.from_numpy(truth.weights).double() @ tables.flatten(1).double()
        low, high = np.nanquantile([mean_iou(t.view(num_classes, -1)) for t in drawn], [0.025, 0.975])
        figures: Figures = {"miou": mean_iou(whole), "miou_low": float(low), "miou_high": float(high)}
        figures["pixel_accuracy"] = (whole.diagonal().sum() / whole.sum()).item()
        return figures


def pixel_table(
    predicted: Int64[Tensor, "h w"], mask: Int64[Tensor, "h w"], num_classes: int
) -> Float[Tensor, "{num_classes} {num_classes}"]:
    """Pixels by true (row) and predicted class, those without class left out."""
    known = mask != IGNORED
    cells = (mask[known] * num_classes + predicted[known]).bincount(minlength=num_classes**2)
    return cells.view(num_classes, num_classes).double()


def mean_iou(table: Float[Tensor, "l l"]) -> float:
    """Intersection over union, the mean over the classes that are there or were predicted."""
    union = table.sum(dim=0) + table.sum(dim=1) - table.diagonal()
    return (table.diagonal()[union > 0] / union[union > 0]).mean().item()


def evaluate_patches(
    encoder: Encoder,
    train: ImageSource,
    test: ImageSource,
    masks: Any,
    protocols: Sequence[str] = ("patch-knn", "patch-linear"),
    options: ProtocolOptions = DEFAULT_OPTIONS,
    setting: Setting = DEFAULT_SETTING,
) -> list[dict[str, Any]]:
    """Judge the patch tokens of one encoder on one data set with masks.

    Parameters
    ----------
    encoder
        With patches that tile the image.
    train, test
        Images; they need no labels.
    masks
        As `MaskImages` takes them.
    protocols
        Names from `DENSE`.
    options, setting
        As for `evaluate`; one process, features are not kept on disk.

    Returns
    -------
    list[dict]
        A row for each layer and protocol, with `miou` in [0, 1]. Classes that only test masks have count as missed.

    Raises
    ------
    InputError
        Masks that do not fit, a single class, or an encoder without patches on a grid.
    """
    view = view_for(encoder, train.view)
    train_masks, test_masks = MaskImages(masks, train), MaskImages(masks, test)
    encoder = encoder.to(setting.device).eval()
    grid = _grid(encoder, view.image_size, setting.device)
    which = chosen_layers(encoder, setting.layers)
    features, classes, images = _training_patches(encoder, train, train_masks, grid, which, setting, options.seed)
    seen = classes.bincount().nonzero().flatten()
    if len(seen) < 2:
        raise InputError(f"The masks of {train.name} (train) hold a single class, {seen.tolist()}: two are needed.")
    num_classes = int(classes.max()) + 1
    held = hold_out(np.zeros(len(train), dtype=np.int64), VALIDATION_FRACTION, options.seed, train.groups)
    validation = torch.from_numpy(held)[images].to(setting.device)
    judges = {
        (layer, name): DENSE[name](
            features[layer].to(setting.device), classes.to(setting.device), num_classes, validation
        )
        for layer in which
        for name in protocols
    }
    loader = make_loader(
        test, view, batch_size=setting.batch_size, train=False, device=setting.device, workers=setting.workers
    )
    answers = {key: Segmentation(found) for key, found in _segment(encoder, loader, judges, grid, which).items()}
    # Only now are the test masks read.
    truth = torch.stack([test_masks.view(i, view) for i in range(len(test))])
    count = max(num_classes, int(truth[truth != IGNORED].max()) + 1 if (truth != IGNORED).any() else 0)
    sizes = {"n_train": len(train), "n_test": len(test), "classes": count, "seed": options.seed}
    return [
        {"encoder": encoder.name, "data": train.name, "protocol": name, "pool": "patches", "layer": layer}
        | answers[layer, name].figures(truth, count, options.seed, test.groups)
        | judge.chosen
        | {"dim": features[layer].shape[1], "train_patches": len(classes)}
        | sizes
        for (layer, name), judge in judges.items()
    ]


def _grid(encoder: Encoder, size: tuple[int, int], device: str | torch.device) -> tuple[int, int]:
    """Patches down and across: of a square image their root, else what keeps them nearest to square."""
    with torch.no_grad():
        output = encoder(torch.zeros(1, encoder.channels, *size, device=device))
    if output.patches is None:
        raise InputError(f"{encoder.name} has no patches, so there is nothing to judge patch by patch.")
    count = output.patches.shape[1]
    fits = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    rows, columns = min(fits, key=lambda g: abs(np.log(size[0] / g[0]) - np.log(size[1] / g[1])))
    if size[0] % rows or size[1] % columns:
        raise InputError(
            f"{encoder.name} makes {rows} × {columns} patches of images of {size[0]} × {size[1]} pixels, which do not "
            f"tile them. Choose an --image-size that they divide."
        )
    return rows, columns


def _training_patches(
    encoder: Encoder,
    train: ImageSource,
    masks: MaskImages,
    grid: tuple[int, int],
    which: Sequence[int],
    setting: Setting,
    seed: int,
) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """Features of some patches of each image, their classes, and the image of each."""
    view = view_for(encoder, train.view)
    loader = make_loader(
        train, view, batch_size=setting.batch_size, train=False, device=setting.device, workers=setting.workers
    )
    each = max(1, min(grid[0] * grid[1], PATCHES // len(train)))
    features: dict[int, list[Tensor]] = {layer: [] for layer in which}
    classes, images = [], []
    for batch in loader.epoch():
        index = batch.index.cpu()
        patches = torch.stack([_patch_classes(masks.view(int(i), view), grid) for i in index])
        key = counter_hash(seed, Stream.SAMPLE, index[:, None], torch.arange(patches.shape[1]))
        keep = key.argsort(dim=1).argsort(dim=1).lt(each) & (patches >= 0)
        with torch.inference_mode():
            outputs = encoder.layers(batch.images, list(which))
        for layer, output in zip(which, outputs, strict=True):
            assert output.patches is not None
            features[layer].append(output.patches[keep.to(output.patches.device)].float().cpu())
        classes.append(patches[keep])
        images.append(index[:, None].expand_as(patches)[keep])
        setting.progress(f"patches of {encoder.name} on {train.name}", int(index[-1]) + 1, len(train))
    return {layer: torch.cat(parts) for layer, parts in features.items()}, torch.cat(classes), torch.cat(images)


def _patch_classes(mask: Int64[Tensor, "h w"], grid: tuple[int, int]) -> Int64[Tensor, " n"]:
    """The commonest class of each patch; patches need not be square, so the mask is cut as if they were."""
    height, width = mask.shape[0] // grid[0], mask.shape[1] // grid[1]
    side = int(np.lcm(height, width))
    square = mask.repeat_interleave(side // height, 0).repeat_interleave(side // width, 1)
    return patch_classes(square[None], side, IGNORED)[0]


def _segment(
    encoder: Encoder, loader: Loader, judges: dict[tuple[int, str], Any], grid: tuple[int, int], which: Sequence[int]
) -> dict[tuple[int, str], Tensor]:
    """The class of each pixel of each test view, by each judge."""
    found: dict[tuple[int, str], list[Tensor]] = {key: [] for key in judges}
    for batch in loader.epoch():
        with torch.inference_mode():
            outputs = dict(zip(which, encoder.layers(batch.images, list(which)), strict=True))
        for (layer, name), judge in judges.items():
            patches = outputs[layer].patches
            assert patches is not None
            answer: Scores = judge.answer(patches.flatten(0, 1).float())
            scores = answer.scores.float().view(len(patches), *grid, -1).permute(0, 3, 1, 2)
            pixels = functional.interpolate(scores, loader.view.image_size, mode="bilinear").argmax(dim=1)
            found[layer, name].append(pixels.cpu())
    return {key: torch.cat(parts) for key, parts in found.items()}
