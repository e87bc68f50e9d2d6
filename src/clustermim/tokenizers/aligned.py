"""A vocabulary merged so that its tokens line up with classes: many centroids, few tokens.

The centroids are those of an ordinary K-means; labels only decide which of them share a token (`merging`).
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from clustermim.errors import InputError
from clustermim.features.patches import PatchFeatures, rebuild_features
from clustermim.tokenizers.clustered import KMeansTokenizer
from clustermim.tokenizers.codebook import Codebook
from clustermim.tokenizers.merging import choose_prior_weight, merge_tokens
from clustermim.tokenizers.tokenizer import Tokenizer


class AlignedTokenizer(Tokenizer):
    """The group of the centroid nearest to a patch's features.

    `codebook` is None: a token has no centroid of its own, but several, in `fine`.

    Parameters
    ----------
    config
        Also holds ``features`` (their config), ``dim``, ``metric`` and ``fine_size`` (number of centroids).
    features, fine
        The fitted parts; None to make empty ones, whose state is loaded afterwards.
    groups
        (fine_size,) token of each centroid.
    """

    kind = "aligned"
    features: PatchFeatures
    groups: Tensor

    def __init__(
        self,
        config: dict[str, Any],
        features: PatchFeatures | None = None,
        fine: Codebook | None = None,
        groups: Int64[Tensor, " fine"] | None = None,
    ) -> None:
        super().__init__(config)
        self.features = rebuild_features(config["features"]) if features is None else features
        size = int(config["fine_size"])
        self.fine = Codebook(torch.zeros(size, int(config["dim"])), config["metric"]) if fine is None else fine
        self.register_buffer("groups", torch.zeros(size, dtype=torch.int64) if groups is None else groups)
        self.requires_grad_(False).eval()

    def tokens(
        self,
        images: Float[Tensor, "b c h w"],
        index: Int64[Tensor, " b"] | None,
        labels: Int64[Tensor, " b"] | None,
    ) -> Int64[Tensor, "b n"]:
        """Describe, look up the centroid, look up its group."""
        described = self.features(images)
        return self.groups[self.fine.assign(described.flatten(0, 1))].view(described.shape[:2])


def merge_vocabulary(
    fine: KMeansTokenizer, tables: Float64[np.ndarray, "folds fine l"], k: int, facts: dict[str, Any] | None = None
) -> AlignedTokenizer:
    """Merge the tokens of a K-means tokenizer down to k, as their counts in labelled images advise.

    A centroid that no patch of these images chose joins the group of the nearest centroid that some patch did.

    Parameters
    ----------
    fine
        More tokens than k.
    tables
        Patches of each token in each class, a table a fold of images: two or more, so that it can be measured how far
        shares of rare tokens are to be trusted (`choose_prior_weight`).
    k
        Tokens wanted.
    facts
        Provenance to be kept beside that of `fine`.

    Raises
    ------
    InputError
        As `merge_tokens`; also where `fine` has no more than k tokens.
    """
    if fine.vocab_size <= k:
        raise InputError(f"There is nothing to merge: {fine.vocab_size} fine tokens for a vocabulary of {k}.")
    prior_weight = choose_prior_weight(tables)
    merging = merge_tokens(tables.sum(axis=0), k, prior_weight=prior_weight)
    seen = np.flatnonzero(merging.groups >= 0)
    groups = torch.from_numpy(merging.groups)
    unseen = np.flatnonzero(merging.groups < 0)
    if len(unseen):
        known = Codebook(fine.codebook.centroids[seen], fine.codebook.metric)
        nearest = known.assign(fine.codebook.centroids[unseen])
        groups[unseen] = groups[seen][nearest.cpu()]
    config = {**fine.config, "vocab_size": k, "fine_size": fine.vocab_size}
    told = {"align_from": fine.vocab_size, "align_prior_patches": prior_weight, "fine_tokens_seen": len(seen)}
    config["facts"] = {**fine.facts, **told, **(facts or {})}
    for stale in ("used_tokens", "perplexity"):
        config["facts"].pop(stale, None)
    return AlignedTokenizer(config, fine.features, fine.codebook, groups)
