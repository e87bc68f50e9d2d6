"""Token ids that are computed once an image: of use where training shows the same view of it in every epoch.

Where a view is another in each epoch its ids must be computed each time. Where it is not (no flip, and a crop that is
the whole image), they are a function of the image's index alone, and a tokenizer that costs as much as a training step
need not be asked again.
"""

import numpy as np
import torch
from jaxtyping import Int64
from rich.filesize import decimal
from torch import Tensor

from clustermim.data.loaders import Loader, free_memory
from clustermim.data.views import ViewConfig
from clustermim.errors import InputError
from clustermim.tokenizers.id_types import id_type
from clustermim.tokenizers.tokenizer import Tokenizer

_SHARE = 0.25
"""Of the free memory of the machine, that ids may take."""


class CachedIds:
    """A tokenizer's ids by index of the image, filled as images are met.

    Takes images · patches · 1 byte of memory up to 256 tokens, 2 bytes up to 65,536, 4 beyond: 235 MB for the 1.2
    million images of ImageNet in 196 patches. Each process keeps what it has met, and a resumed run begins anew;
    neither changes an id where the tokenizer is `batch_invariant`.

    Parameters
    ----------
    tokenizer
        Wherever the images are.
    images
        Number of images in the source.
    patches
        N, patches of an image.
    """

    def __init__(self, tokenizer: Tokenizer, images: int, patches: int) -> None:
        self.tokenizer = tokenizer
        self.ids = np.empty((images, patches), dtype=id_type(tokenizer.vocab_size))
        self.known = np.zeros(images, dtype=bool)

    def encode(
        self, images: Tensor, keys: Int64[Tensor, " b"], *, index: Tensor | None = None, labels: Tensor | None = None
    ) -> Int64[Tensor, "b n"]:
        """What `Tokenizer.encode` gives, asking it only for images that it was not asked for before.

        Parameters
        ----------
        images
            (B, C, H, W) in [0, 1].
        keys
            (B,) on the CPU: index of each image, or -1 where its ids must not be kept (`Batch.keys`).
        index, labels
            Of each image, for tokenizers that require them.
        """
        rows = keys.numpy()
        missing = np.flatnonzero((rows < 0) | ~self.known[rows])
        found = self.ids[rows].astype(np.int64)
        if len(missing):
            places = torch.from_numpy(missing).to(images.device)
            beside = {"index": index, "labels": labels}
            asked = {name: None if value is None else value[places] for name, value in beside.items()}
            new = self.tokenizer.encode(images[places], **asked).cpu().numpy()
            kept = rows[missing] >= 0
            self.ids[rows[missing][kept]] = new[kept]
            self.known[rows[missing][kept]] = True
            found[missing] = new
        ids = torch.from_numpy(found)
        if images.device.type == "cuda":
            ids = ids.pin_memory()  # else the copy would make the host wait
        return ids.to(images.device, non_blocking=True)


def cached_ids(tokenizer: Tokenizer, loader: Loader, wanted: bool | None) -> tuple[CachedIds | None, str]:
    """A cache for the ids of a loader's images, and a sentence for the reader.

    Parameters
    ----------
    tokenizer
        Of the training.
    loader
        Of the training.
    wanted
        None: where views repeat, ids are exact, and asking for them costs anything.

    Returns
    -------
    tuple
        None and "" where there is nothing to keep.
    """
    size = loader.source.common_size
    if not (tokenizer.batch_invariant if wanted is None else wanted) or not may_repeat(loader.view):
        return None, ""
    if size is not None and not loader.repeats(*size):
        return None, f"Token ids are computed in every epoch: of {size[0]} × {size[1]} pixels crops may differ."
    patches = loader.view.image_size[0] // tokenizer.patch_size * (loader.view.image_size[1] // tokenizer.patch_size)
    takes = loader.num_images * patches * id_type(tokenizer.vocab_size).itemsize
    if takes > _SHARE * free_memory(torch.device("cpu")):
        return None, f"Token ids are computed in every epoch: kept, they would take {decimal(takes)}."
    cache = CachedIds(tokenizer, loader.num_images, patches)
    return (
        cache,
        f"Views are the same in every epoch: token ids are computed once an image and kept ({decimal(takes)}).",
    )


def check_cached_ids(view: ViewConfig, soft: float) -> None:
    """Refuse to keep ids that are not the same in the next epoch, or that are not what is predicted.

    Raises
    ------
    InputError
        For --cache-ids.
    """
    if not may_repeat(view):
        raise InputError(
            "--cache-ids needs views that are the same in every epoch, and these are cropped or mirrored at random: "
            "add --no-flip --crop-scale 1 1, or leave it out."
        )
    if soft:
        raise InputError("--cache-ids keeps ids, and --soft-targets asks for distances: leave out one of them.")


def may_repeat(view: ViewConfig) -> bool:
    """Whether training views of images of some size are the same in every epoch (`repeats` says of which)."""
    return not view.flip and view.crop_scale == (1.0, 1.0)
