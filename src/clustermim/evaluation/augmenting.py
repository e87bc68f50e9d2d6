"""What fine-tuning does to images beyond crop and flip: RandAugment for each image, mixup and CutMix for each batch.

timm's own, with their randomness counted: they draw from Python's and NumPy's global generators, which are set from
(seed, epoch, image) or (seed, step) for the call and put back after it.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.mixup import Mixup
from torch import Tensor

from clustermim.data.counted import Stream, counter_hash
from clustermim.errors import InputError


@contextlib.contextmanager
def seeded(*counters: int) -> Iterator[None]:
    """Set Python's and NumPy's global generators from the counters, and put them back."""
    key = int(counter_hash(counters[0], *counters[1:])) & 0xFFFFFFFF
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws from there
    random.seed(key)
    np.random.seed(key)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


class RandAugment:
    """timm's RandAugment (Cubuk et al. 2020), a function of (seed, epoch, image); picklable for workers.

    Parameters
    ----------
    policy
        As timm writes it, for example `rand-m9-mstd0.5-inc1`.
    channels
        1 or 3: the operations are those of Pillow.
    mean
        Of each channel, in [0, 1]: fills what moves in from outside.
    seed
        Of all draws.

    Raises
    ------
    InputError
        A policy that timm does not understand, or other channels.
    """

    def __init__(self, policy: str, *, channels: int, mean: tuple[float, ...], seed: int) -> None:
        if channels not in (1, 3):
            raise InputError(
                f"RandAugment changes grey and colour images only, these have {channels} channels: use --randaugment "
                f"none."
            )
        fill = tuple(round(255 * value) for value in mean)
        try:
            with seeded(0, 0):
                self.transform = rand_augment_transform(policy, {"img_mean": fill[0] if channels == 1 else fill})
        except (AssertionError, ValueError, KeyError, IndexError) as problem:
            raise InputError(
                f"--randaugment {policy!r} is no policy of timm's ({str(problem) or 'it cannot be read'}). Write for "
                f"example rand-m9-mstd0.5-inc1, or none."
            ) from None
        for operation in self.transform.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
        self.seed = seed

    def __call__(self, view: Float[Tensor, "c h w"], epoch: int, index: int) -> Float[Tensor, "c h w"]:
        """The view after two operations, rounded to 8 bits."""
        pixels = (view * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        with seeded(self.seed, Stream.INIT, epoch, index):
            changed = np.asarray(self.transform(image))
        changed = changed[..., None] if changed.ndim == 2 else changed
        return torch.from_numpy(changed.copy()).permute(2, 0, 1).float() / 255


def _posterize(image: Image.Image, bits: int, **others: Any) -> Image.Image:
    """Keep one bit at least: at the highest magnitude timm asks for none, which Pillow refuses from version 13 on."""
    keep: Any = posterize  # untyped
    changed: Image.Image = keep(image, max(1, bits), **others)
    return changed


class Mixing:
    """timm's mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), one of the two for each batch, drawn by step.

    Parameters
    ----------
    mixup, cutmix
        Parameters of the beta distributions; 0 turns the one off.
    smoothing
        Share of the target that is spread over all classes.
    num_classes
        Number of classes.
    seed
        Of the draws.
    """

    def __init__(self, mixup: float, cutmix: float, smoothing: float, num_classes: int, seed: int) -> None:
        self.smoothing, self.num_classes, self.seed = smoothing, num_classes, seed
        self.mix: Any = None
        if mixup > 0 or cutmix > 0:
            made: Any = Mixup  # untyped
            self.mix = made(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(
        self, images: Float[Tensor, "b c h w"], labels: Int64[Tensor, " b"], step: int, rank: int = 0
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b l"]]:
        """Mixed images and soft targets, whose rows sum to 1. The last of an odd number of images stays as it is."""
        hot = torch.nn.functional.one_hot(labels, self.num_classes).to(images.dtype)
        targets = hot * (1 - self.smoothing) + self.smoothing / self.num_classes
        even = len(images) // 2 * 2
        if self.mix is None or even == 0:
            return images, targets
        with seeded(self.seed, Stream.SAMPLE, step, rank):
            mixed, soft = self.mix(images[:even].clone(), labels[:even])
        return torch.cat([mixed, images[even:]]), torch.cat([soft.to(targets), targets[even:]])
