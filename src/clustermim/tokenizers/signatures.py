"""Failure signatures: what a fit that went wrong looks like, each with a sentence of advice.

Every finding is a pure function of a few numbers, so that it can be provoked in a test; `note_signatures` gathers the
numbers after a fit and writes what was found into the tokenizer's facts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from clustermim.data.loaders import make_loader
from clustermim.data.streaming.source import AnySource, StreamSource
from clustermim.tokenizers.codebook import unit_rows
from clustermim.tokenizers.tokenizer import Tokenizer

SPREAD = 0.05
"""Starts whose inertias differ by more than this share ended in different optima, not in different rounding."""

UNUSED = 0.01
"""Share of the vocabulary that may go unused before it is told."""

MERGING_COST = 0.01
"""Two tokens are near-duplicates if to merge them would raise the squared error of their patches by less than this
share: halfway between centroids at distance d the error grows by d²/4."""

SEPARATION = 0.05
"""Near-duplicates must also be closer than this share of the distance between two centroids drawn at random: among many
dimensions of noise every merger is cheap, though no two centroids are alike."""

EVENNESS = 0.25
"""Perplexity below this share of K: a few tokens name most patches."""

FEW_IMAGES = 10
"""Below it a token has fewer than two images in each of the five folds of a cross-fitted score."""

SPARSE = 0.05
"""Share of the used tokens that may occur in so few images."""

LOOKED_AT = 5000
"""Images in which tokens are counted after a fit, spread evenly over the data: enough to tell a rare token."""

COMPARED = 8192
"""Centroids that are compared with all others, spread evenly over the vocabulary: enough to tell a share of 1 %."""

_BLOCK_SCORES = 1 << 25


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One finding."""

    name: str
    value: float
    """What was measured, as the sentence says it."""
    says: str
    """The finding, and what to do about it."""


def start_spread(inertias: Sequence[float]) -> Signature | None:
    """Starts that end in different optima.

    Parameters
    ----------
    inertias
        Of each start, all on the same rows; fewer than two say nothing.
    """
    if len(inertias) < 2 or min(inertias) <= 0.0:
        return None
    spread = max(inertias) / min(inertias) - 1.0
    if spread <= SPREAD:
        return None
    return Signature(
        name="starts disagree",
        value=spread,
        says=f"The {len(inertias)} starts differ by {_percent(spread)} in inertia, so the clusters depend on the seed: "
        f"raise --n-init to {4 * len(inertias)}, or choose another --k.",
    )


def unused_tokens(used: int, k: int, *, learned: bool = False) -> Signature | None:
    """Tokens that no patch has; `learned` ones may come into use with more training."""
    share = 1.0 - used / k
    if share <= UNUSED:
        return None
    return Signature(
        name="unused tokens",
        value=k - used,
        says=f"{k - used:,} of {k:,} tokens ({_percent(share)}) are never used: they cost a class each in the model's "
        f"head and mean nothing. {'Train longer (--epochs), choose' if learned else 'Choose'} --k of about {used:,}, "
        "or fit on more varied images.",
    )


def near_duplicates(centroids: Float[Tensor, "k d"], error: float, *, unit: bool = False) -> Signature | None:
    """Pairs of centroids that tell nothing apart.

    Parameters
    ----------
    centroids
        (K, D).
    error
        Mean squared distance of a patch to its centroid.
    unit
        Compare directions (spherical K-means).
    """
    if len(centroids) < 2:
        return None
    table = unit_rows(centroids) if unit else centroids
    looked_at = min(len(table), COMPARED)
    rows = torch.arange(looked_at) * len(table) // looked_at
    squared, other = nearest_other(table, rows)
    exact = table.double()
    between = 2.0 * float((exact - exact.mean(0)).square().sum(1).mean())
    close = (squared <= 4.0 * MERGING_COST * error) & (squared <= SEPARATION**2 * between)
    number = int(close.sum())
    if not number:
        return None
    first = int(squared.argmin())
    pair = f"closest: {int(rows[first])} and {int(other[first])}"
    looked = "" if len(rows) == len(table) else " that were compared with all others"
    return Signature(
        name="near-duplicate tokens",
        value=number,
        says=f"{number:,} of {len(rows):,} tokens{looked} have a near-duplicate ({pair}), and which of the two a patch "
        "gets is chance that the model is asked to predict. Choose a smaller --k, or features that vary more.",
    )


def nearest_other(
    centroids: Float[Tensor, "k d"], rows: Int64[Tensor, " m"]
) -> tuple[Float64[Tensor, " m"], Int64[Tensor, " m"]]:
    """Squared distance of some centroids to the nearest other one, and which that is; in blocks, for any K.

    The search runs in float32; the distance of the pair that it finds is then computed in float64.
    """
    c = (centroids.double() - centroids.double().mean(0)).float()
    half, columns = -0.5 * c.square().sum(1), c.t()
    found = []
    for part in torch.split(rows, max(1, _BLOCK_SCORES // len(centroids))):
        scores = torch.addmm(half, c[part], columns)
        scores[torch.arange(len(part)), part] = -torch.inf
        found.append(scores.max(1).indices)
    other = torch.cat(found)
    exact = centroids.double()
    return (exact[rows] - exact[other]).square().sum(1), other


def uneven_use(perplexity: float, k: int, commonest: float, *, learned: bool = False) -> Signature | None:
    """A few tokens that name most patches.

    Parameters
    ----------
    perplexity
        Tokens in even use: exp of the entropy of the token marginal.
    k
        Vocabulary.
    commonest
        Share of the patches that the commonest token has.
    learned
        Whether the tokens were trained, and not clustered: they take other options.
    """
    remedy = "training longer (--epochs)" if learned else "pixel?standardise=true, --metric cosine"
    if perplexity >= EVENNESS * k:
        return None
    return Signature(
        name="uneven use",
        value=perplexity,
        says=f"The {k:,} tokens are used as unevenly as {perplexity:,.1f} would be evenly, and the commonest names "
        f"{_percent(commonest)} of the patches (background?), so there is little to predict: try "
        f"{remedy}, or a larger --patch-size.",
    )


def rare_tokens(images_with: Int64[np.ndarray, " k"], images: int) -> Signature | None:
    """Tokens seen in too few images to be scored.

    Parameters
    ----------
    images_with
        (K,) number of images in which each token occurs.
    images
        How many were looked at.
    """
    used = images_with[images_with > 0]
    rare = int((used < FEW_IMAGES).sum())
    if not len(used) or rare <= SPARSE * len(used):
        return None
    return Signature(
        name="tokens too rare to score",
        value=rare,
        says=f"{rare:,} of {len(used):,} used tokens ({_percent(rare / len(used))}) occur in fewer than {FEW_IMAGES} "
        f"of {images:,} images, too few to tell their class. Choose a smaller --k, or score on more images and "
        "trust the cross-fitted score only.",
    )


def constant_dimensions(constant: Sequence[int], dim: int) -> Signature | None:
    """Feature dimensions of no variance.

    Parameters
    ----------
    constant
        Their numbers.
    dim
        D, dimensions in all.
    """
    if not constant:
        return None
    named = ", ".join(str(number) for number in constant[:5]) + (", …" if len(constant) > 5 else "")
    return Signature(
        name="constant features",
        value=len(constant),
        says=f"{len(constant):,} of {dim:,} feature dimensions never vary (numbers {named}) and tell no patches apart: "
        "look for an empty channel, a border that all images share, or a dead unit of the network.",
    )


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How a tokenizer names the patches of some images."""

    counts: Int64[np.ndarray, " k"]
    """Patches that have each token."""
    images_with: Int64[np.ndarray, " k"]
    """Images in which each token occurs."""
    images: int
    error: float | None
    """Mean squared distance of a patch to its centroid; None where that is not asked for."""
    constant: tuple[int, ...] | None
    """Feature dimensions that never vary; None where that is not asked for."""

    @property
    def perplexity(self) -> float:
        """Tokens in even use."""
        share = self.counts[self.counts > 0] / self.counts.sum()
        return float(np.exp(-(share * np.log(share)).sum()))


@torch.no_grad()
def usage_of(
    tokenizer: Tokenizer,
    source: AnySource,
    *,
    most: int = LOOKED_AT,
    measure: bool = True,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    workers: int | None = None,
) -> Usage:
    """Name the patches of up to `most` images, spread evenly over the source.

    Parameters
    ----------
    tokenizer
        One that needs nothing but the images; comes back on the device on which it was.
    source
        Images that fit it.
    most
        Images to look at.
    measure
        Also describe the patches, for `error` and `constant`.
    batch_size, device, workers
        As for `fit`.
    """
    if isinstance(source, StreamSource):
        source = source.spread(most)
    elif len(source) > most:
        source = source.subset(np.unique(np.linspace(0, len(source) - 1, most).round().astype(np.int64)))
    k = tokenizer.vocab_size
    counts, images_with = np.zeros(k, dtype=np.int64), np.zeros(k, dtype=np.int64)
    features, codebook = tokenizer.features, tokenizer.codebook
    measure = measure and features is not None and codebook is not None
    low = high = None
    squares, rows = 0.0, 0
    before = next(iter(tokenizer.state_dict().values()), torch.empty(0)).device
    tokenizer.to(device)
    for batch in make_loader(source, batch_size=batch_size, train=False, device=device, workers=workers).epoch():
        ids = tokenizer.encode(batch.images)
        counts += np.bincount(ids.flatten().cpu().numpy(), minlength=k)
        # Sorted rows: a token counts where it differs from its left neighbour.
        ordered = ids.sort(dim=1).values
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        images_with += np.bincount(ordered[first].cpu().numpy(), minlength=k)
        if measure:
            assert features is not None and codebook is not None
            described = features(batch.images).flatten(0, 1).float()
            least, largest = described.amin(0), described.amax(0)
            low = least if low is None else torch.minimum(low, least)
            high = largest if high is None else torch.maximum(high, largest)
            compared = unit_rows(described) if codebook.metric == "cosine" else described
            squares += float((compared - codebook.centroids[ids.flatten()]).square().sum(1).double().sum())
            rows += len(described)
    tokenizer.to(before)
    constant = None if low is None or high is None else tuple((low == high).nonzero()[:, 0].tolist())
    return Usage(
        counts=counts,
        images_with=images_with,
        images=len(source),
        error=squares / rows if rows else None,
        constant=constant,
    )


def signatures_of(tokenizer: Tokenizer, usage: Usage) -> list[Signature]:
    """What is wrong with a fitted tokenizer; empty for a healthy one.

    What its facts hold about the whole data (used tokens, perplexity, inertia, starts, constant dimensions) is
    preferred to what was seen in the images that were looked at.
    """
    facts, k = tokenizer.facts, tokenizer.vocab_size
    constant = facts.get("constant_dimensions", usage.constant)
    error = facts.get("inertia_per_patch", usage.error)
    features, codebook = tokenizer.features, tokenizer.codebook
    learned = tokenizer.kind == "vqvae"
    commonest = float(usage.counts.max() / usage.counts.sum())
    found = [
        start_spread(facts.get("starts", ())),
        unused_tokens(facts.get("used_tokens", int((usage.counts > 0).sum())), k, learned=learned),
        uneven_use(facts.get("perplexity", usage.perplexity), k, commonest, learned=learned),
        rare_tokens(usage.images_with, usage.images),
    ]
    if codebook is not None and codebook.metric != "dot" and error is not None:
        found.append(near_duplicates(codebook.centroids, error, unit=codebook.metric == "cosine"))
    if features is not None and constant is not None:
        found.append(constant_dimensions(constant, features.dim))
    return [signature for signature in found if signature is not None]


def note_signatures(
    tokenizer: Tokenizer,
    source: AnySource,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    workers: int | None = None,
) -> None:
    """Look at a tokenizer that was just fitted, and write what is wrong with it under ``signatures`` in its facts.

    Parameters
    ----------
    tokenizer
        One that needs nothing but the images.
    source
        The images on which it was fitted.
    batch_size, device, workers
        As for `fit`.
    """
    facts: dict[str, Any] = tokenizer.config.setdefault("facts", {})
    known = "inertia_per_patch" in facts and "constant_dimensions" in facts
    usage = usage_of(tokenizer, source, measure=not known, batch_size=batch_size, device=device, workers=workers)
    facts["signatures"] = [asdict(signature) for signature in signatures_of(tokenizer, usage)]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
