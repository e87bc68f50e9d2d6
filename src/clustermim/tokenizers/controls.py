"""Tokenizers that bracket every result: what no tokenizer, no learning, chance, place and perfect knowledge would give.

`identity` and `random` score an alignment of 0 under cross-fitting, `oracle` 1. None of them looks at the pixels, save
`random-centroids`: K-means without the means.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clustermim.data.counted import Stream, counter_hash
from clustermim.errors import InputError
from clustermim.tokenizers.clustered import KMeansTokenizer
from clustermim.tokenizers.tokenizer import Tokenizer


class RandomCentroidsTokenizer(KMeansTokenizer):
    """Nearest of K Gaussian draws that have the features' mean and standard deviation, dimension by dimension."""

    kind = "random-centroids"


class PositionTokenizer(Tokenizer):
    """Where the patch lies: its number in row-major order; K = N."""

    kind = "position"

    def tokens(
        self,
        images: Float[Tensor, "b c h w"],
        index: Int64[Tensor, " b"] | None,
        labels: Int64[Tensor, " b"] | None,
    ) -> Int64[Tensor, "b n"]:
        """The same row for each image."""
        return self.places(images).expand(len(images), -1).clone()

    def check_images(self, images: Float[Tensor, "b c h w"]) -> None:
        """Check that the images have the patch grid that positions were numbered on.

        Raises
        ------
        InputError
            Other channels or another size.
        """
        super().check_images(images)
        height, width = self.image_size
        if (images.shape[2], images.shape[3]) != (height, width):
            raise InputError(
                f"Tokens of kind {self.kind!r} are tied to {height} × {width} pixels; these images have "
                f"{images.shape[2]} × {images.shape[3]}. Use --image-size {height} {width}."
            )

    def places(self, images: Float[Tensor, "b c h w"]) -> Int64[Tensor, " n"]:
        """0 to N − 1."""
        return torch.arange(self.grid[0] * self.grid[1], device=images.device)


class IdentityTokenizer(PositionTokenizer):
    """Every patch of the data set a token of its own: index · N + position; K = images · N (what MAE predicts)."""

    kind = "identity"
    requires = frozenset({"index"})

    def tokens(
        self,
        images: Float[Tensor, "b c h w"],
        index: Int64[Tensor, " b"] | None,
        labels: Int64[Tensor, " b"] | None,
    ) -> Int64[Tensor, "b n"]:
        """Raises InputError for images beyond those it was made for."""
        assert index is not None
        places = self.places(images)
        ids = index.to(images.device)[:, None] * len(places) + places
        _check_range(ids, self.vocab_size, f"images 0 to {self.vocab_size // len(places) - 1}", "index")
        return ids


class RandomTokenizer(PositionTokenizer):
    """A hash of image and position: chance, but the same each time a patch is met."""

    kind = "random"
    requires = frozenset({"index"})

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.seed = int(config.get("seed", 0))

    def tokens(
        self,
        images: Float[Tensor, "b c h w"],
        index: Int64[Tensor, " b"] | None,
        labels: Int64[Tensor, " b"] | None,
    ) -> Int64[Tensor, "b n"]:
        """Uniform over [0, K), up to K / 2^63."""
        assert index is not None
        bits = counter_hash(self.seed, Stream.TOKENS, index.to(images.device)[:, None], self.places(images))
        return (bits & ((1 << 63) - 1)) % self.vocab_size


class OracleTokenizer(PositionTokenizer):
    """The image's class, for each of its patches; K = number of classes."""

    kind = "oracle"
    requires = frozenset({"labels"})

    def tokens(
        self,
        images: Float[Tensor, "b c h w"],
        index: Int64[Tensor, " b"] | None,
        labels: Int64[Tensor, " b"] | None,
    ) -> Int64[Tensor, "b n"]:
        """Raises InputError for a class that was not there when it was made."""
        assert labels is not None
        _check_range(labels, self.vocab_size, f"classes 0 to {self.vocab_size - 1}", "labels")
        return labels.to(images.device)[:, None].repeat(1, len(self.places(images)))


def _check_range(ids: Tensor, size: int, known: str, what: str) -> None:
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < size):
        raise InputError(
            f"This control knows {known}, and was given others in `{what}`. Make it from the data on which it is used."
        )
