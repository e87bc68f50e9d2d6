"""Experimental: how good tokens are without any label, from the images themselves.

An image is most often of one class, and its augmented views are views of the same things. So tokens that recur between
two views of an image, or between patches of one image, more than between images, carry something that lasts; tokens
of noise do not. Whether that foretells downstream accuracy is open, and there is one way to fool it: position and
identity controls recur without carrying anything. Compare tokenizers of content only.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from scipy import sparse
from torch import Tensor

from clustermim.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Excess agreement of tokens inside images, each 0 for chance and 1 for one token an image of its own."""

    view_agreement: float
    """Between a patch of one view and a patch of another view of the same image, beyond those of different images."""
    patch_agreement: float
    """Between two patches of one view, beyond patches of different images."""
    images: int

    def to_dict(self) -> dict[str, Any]:
        """A flat record."""
        return {
            "view_agreement": self.view_agreement,
            "patch_agreement": self.patch_agreement,
            "agreement_images": self.images,
        }


class AgreementCounts:
    """Streaming counts of tokens in two views of each image.

    Parameters
    ----------
    images
        Number of images.
    vocab_size
        K.
    """

    def __init__(self, images: int, vocab_size: int) -> None:
        self.images, self.vocab_size = images, vocab_size
        self._parts: tuple[list[sparse.coo_matrix], list[sparse.coo_matrix]] = ([], [])

    def update(self, view: int, ids: Int[Tensor, "batch patches"], index: Int[Tensor, " batch"]) -> None:
        """Count one batch of view 0 or 1.

        Raises
        ------
        InputError
            Ids outside [0, K), images outside [0, images).
        """
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.vocab_size):
            raise InputError(f"ids holds tokens outside [0, {self.vocab_size}).")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.images):
            raise InputError(f"index holds images outside [0, {self.images}).")
        rows = index.cpu().repeat_interleave(ids.shape[1]).numpy()
        shape = (self.images, self.vocab_size)
        self._parts[view].append(sparse.coo_matrix((np.ones(ids.numel()), (rows, ids.flatten().cpu().numpy())), shape))

    def agreement(self) -> Agreement:
        """The excess agreements, over the images that were counted in both views.

        With h_x the token shares of image x, the chance that two patches agree is Σ_i h_x[i] h_y[i]; its mean over
        x = y, less its mean over x ≠ y, is divided by what is left to 1.

        Raises
        ------
        InputError
            Fewer than two images in both views.
        """
        if not all(self._parts):
            raise InputError("Agreement needs two views of each image; one was never counted.")
        views = [sum(parts[1:], parts[0].tocsr()).tocsr() for parts in self._parts]
        sizes = [np.asarray(view.sum(axis=1)).ravel() for view in views]
        both = np.flatnonzero((sizes[0] > 0) & (sizes[1] > 0))
        if len(both) < 2:
            raise InputError(f"Agreement needs at least two images in both views; got {len(both)}.")
        first, second = (
            sparse.csr_matrix(sparse.diags_array(1 / size[both]) @ view[both])
            for view, size in zip(views, sizes, strict=True)
        )
        n = len(both)
        own = np.asarray(first.multiply(second).sum(axis=1)).ravel()
        apart = (_dot(first, second) - own.sum()) / (n * (n - 1))
        counts = views[0][both]
        size = sizes[0][both]
        pairs = np.asarray(counts.multiply(counts).sum(axis=1)).ravel() - size
        several = size > 1
        inside = float(np.mean(pairs[several] / (size * (size - 1))[several])) if several.any() else 0.0
        loops = np.asarray(first.multiply(first).sum(axis=1)).ravel()
        outside = (_dot(first, first) - loops.sum()) / (n * (n - 1))
        return Agreement(
            view_agreement=_excess(float(own.mean()), apart), patch_agreement=_excess(inside, outside), images=n
        )


def _dot(first: sparse.csr_matrix, second: sparse.csr_matrix) -> float:
    """Σ_xy Σ_i h_x[i] h_y[i] without the images × images matrix."""
    return float(np.asarray(first.sum(axis=0)).ravel() @ np.asarray(second.sum(axis=0)).ravel())


def _excess(inside: float, outside: float) -> float:
    return (inside - outside) / (1 - outside) if outside < 1 else 0.0


def token_agreement(
    first: Int[Tensor, "images n"], second: Int[Tensor, "images m"], vocab_size: int | None = None
) -> Agreement:
    """Excess agreement of tokens between two views of each image, and between patches of the first.

    Parameters
    ----------
    first, second
        Tokens of the patches of two views of the same images.
    vocab_size
        K. Default: the largest id plus one.

    Raises
    ------
    InputError
        Ids outside [0, K), fewer than two images.
    """
    size = vocab_size if vocab_size is not None else 1 + max(int(first.max()), int(second.max()))
    counts = AgreementCounts(len(first), size)
    for view, ids in enumerate((first, second)):
        counts.update(view, ids, torch.arange(len(ids)))
    return counts.agreement()
