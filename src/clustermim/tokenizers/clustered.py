"""The tokenizer of K-means: a patch is described by features, and gets the id of the nearest centroid."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clustermim.features.patches import PatchFeatures, rebuild_features
from clustermim.tokenizers.codebook import Codebook
from clustermim.tokenizers.tokenizer import Tokenizer
from clustermim.tokenizers.twolevel import TwoLevelCodebook


class KMeansTokenizer(Tokenizer):
    """The id of the centroid nearest to a patch's features.

    Parameters
    ----------
    config
        Also holds ``features`` (their config), ``dim`` and ``metric``; on two levels ``levels`` (2), ``cells`` and
        ``probes``.
    features, codebook
        The fitted parts; None to make empty ones, whose state is loaded afterwards.
    """

    kind = "kmeans"
    features: PatchFeatures
    codebook: Codebook

    def __init__(
        self, config: dict[str, Any], features: PatchFeatures | None = None, codebook: Codebook | None = None
    ) -> None:
        super().__init__(config)
        self.features = rebuild_features(config["features"]) if features is None else features
        self.codebook = self._empty() if codebook is None else codebook
        self.requires_grad_(False).eval()

    def _empty(self) -> Codebook:
        """A codebook of the right sizes, whose state is loaded afterwards."""
        k, dim, metric = self.vocab_size, int(self.config["dim"]), self.config["metric"]
        if self.config.get("levels", 1) == 2:
            return TwoLevelCodebook.empty(k, int(self.config["cells"]), dim, metric, int(self.config["probes"]))
        return Codebook(torch.zeros(k, dim), metric)

    def tokens(
        self,
        images: Float[Tensor, "b c h w"],
        index: Int64[Tensor, " b"] | None,
        labels: Int64[Tensor, " b"] | None,
    ) -> Int64[Tensor, "b n"]:
        """Describe, then look up."""
        described = self.features(images)
        return self.codebook.assign(described.flatten(0, 1)).view(described.shape[:2])
