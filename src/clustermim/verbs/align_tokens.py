"""`tokenizer fit --align-with labels`: merge a fine vocabulary so that its tokens line up with classes.

What that gained is measured on labelled images that took no part in it, against plain K-means of the same size.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from clustermim.data.loaders import Batch, make_loader
from clustermim.data.sources import ImageSource, require_labels
from clustermim.data.splits import hold_out, take
from clustermim.errors import InputError
from clustermim.scoring.comparing import compare
from clustermim.scoring.counts import TokenCounts
from clustermim.scoring.folds import ImagePlan, plan_images
from clustermim.scoring.stream import count_stream
from clustermim.scoring.tcas import score_counts
from clustermim.tokenizers.aligned import AlignedTokenizer, merge_vocabulary
from clustermim.tokenizers.clustered import KMeansTokenizer
from clustermim.tokenizers.fitting import fit
from clustermim.tokenizers.tokenizer import Tokenizer
from clustermim.training.checkpoints import Checkpoints

MOST_JUDGED = 10_000
"""Held-out images that the gain is measured on, at most: more would narrow the interval below what matters."""
BOOTSTRAP = 1000


@dataclass(frozen=True, kw_only=True)
class AlignPlan:
    """Which labelled images decide the merges and which judge them; no image, and no group, does both."""

    aligning: Int64[np.ndarray, " a"]
    judging: Int64[np.ndarray, " j"]
    fine: int
    """Fine tokens, K′."""


def plan_alignment(
    source: ImageSource, k: int, *, fine: int | None, images: int | None, kind: str, seed: int
) -> AlignPlan:
    """Check what can be checked before work starts, and divide the labelled images.

    Parameters
    ----------
    source
        The train split.
    k
        Tokens wanted.
    fine
        K′; None for 20·k, at most 2,000 as long as that is 4·k or more.
    images
        Images to align with, drawn within each class; None for half of all.
    kind
        Kind of tokenizer asked for.
    seed
        Seed of the division.

    Raises
    ------
    InputError
        No labels, not the train split, another kind than K-means, K′ ≤ k, too few images of some class.
    """
    if kind != "kmeans":
        raise InputError(f"--align-with labels merges K-means tokens, not those of --kind {kind}.")
    if source.split != "train":
        raise InputError(
            f"--align-with labels looks at labels, so it takes the train split alone: leave out #{source.split}."
        )
    labels = require_labels(source, "--align-with labels")
    fine = max(4 * k, min(20 * k, 2000)) if fine is None else fine
    if fine <= k:
        raise InputError(f"--align-from {fine} must be larger than --k {k}: a fine vocabulary is merged into a coarse.")
    total = len(labels)
    if images is not None and not 4 <= images < total:
        raise InputError(
            f"--align-images {images}: it must be at least 4 and leave some of the {total:,} labelled images to judge "
            "the gain on."
        )
    share = 0.5 if images is None else max(0.1, 1 - images / total)
    held = hold_out(labels, share, seed, source.groups)
    aligning, judging = np.flatnonzero(~held), np.flatnonzero(held)
    if images is not None:
        aligning = take(aligning, labels[aligning], images, seed)
    judging = take(judging, labels[judging], MOST_JUDGED, seed)
    for part, what in ((aligning, "aligns with"), (judging, "judges the gain on")):
        if _part_plan(source, part, seed).num_folds == 0:
            raise InputError(
                f"--align-with labels {what} {len(part):,} of the {total:,} labelled images, and some class has a "
                "single image (or group) there: bring at least four of each class, or leave out classes this rare."
            )
    return AlignPlan(aligning=aligning, judging=judging, fine=fine)


def fit_aligned(
    source: ImageSource,
    plan: AlignPlan,
    *,
    k: int,
    batch_size: int,
    workers: int | None,
    device: str | torch.device,
    checkpoints: Checkpoints | None = None,
    **fitted: Any,
) -> AlignedTokenizer:
    """Fit the fine and the plain vocabulary, merge the fine one, and measure what that gained.

    Parameters
    ----------
    source, plan
        The train split and its division by `plan_alignment`.
    k
        Tokens wanted.
    batch_size, workers, device
        As for `fit`.
    checkpoints
        In whose folder each of the two fits keeps its own.
    **fitted
        What else `fit` takes.

    Returns
    -------
    AlignedTokenizer
        Its facts hold the gain: alignment, cross-fitted, of the merged and of the plain tokens on the held-out images,
        their difference with its 95 % interval, and the probability that it is above zero.
    """
    make = partial(fit, source, batch_size=batch_size, workers=workers, device=device, **fitted)
    fine, plain = (
        make(k=plan.fine, checkpoints=_own(checkpoints, "fine")),
        make(k=k, checkpoints=_own(checkpoints, "plain")),
    )
    assert isinstance(fine, KMeansTokenizer)
    seed = int(fitted.get("seed", 0))
    loader = make_loader(source, batch_size=batch_size, train=False, device=device, workers=workers)

    def count(tokenizers: Mapping[str, Tokenizer], images: np.ndarray, per_image: bool) -> Mapping[str, TokenCounts]:
        for one in tokenizers.values():
            one.to(device)
        part = _part_plan(source, images, seed)
        return count_stream(tokenizers, _only(loader.epoch(), images), part, per_image=per_image).counts

    started = time.perf_counter()
    counted = count({"fine": fine}, plan.aligning, False)["fine"]
    aligned = merge_vocabulary(fine.cpu(), _fold_tables(counted), k)
    seconds = time.perf_counter() - started
    judged = count({"aligned": aligned, "plain": plain}, plan.judging, True)
    scores = {name: score_counts(one, bootstrap=BOOTSTRAP, seed=seed) for name, one in judged.items()}
    gain = compare(scores["aligned"], scores["plain"])
    facts: dict[str, Any] = {
        "align_images": len(plan.aligning),
        "align_seconds": round(seconds, 2),
        "held_out_images": len(plan.judging),
        "held_out_gain": gain.difference,
        "held_out_gain_low": gain.low,
        "held_out_gain_high": gain.high,
        "held_out_gain_probability": gain.probability,
        "used_tokens": scores["aligned"].used_tokens,
        "perplexity": scores["aligned"].perplexity,
    }
    for name, score in scores.items():
        low, high = score.intervals["alignment_crossfit"]
        facts |= {
            f"held_out_alignment_{name}": score.alignment_crossfit,
            f"held_out_alignment_{name}_low": low,
            f"held_out_alignment_{name}_high": high,
        }
    aligned.config["facts"] |= facts
    return aligned.cpu()


def _own(checkpoints: Checkpoints | None, name: str) -> Checkpoints | None:
    return None if checkpoints is None else Checkpoints(checkpoints.folder / name)


def gain_sentence(tokenizer: Tokenizer) -> str | None:
    """What aligning gained, for people; None for tokenizers that were not aligned."""
    facts = tokenizer.facts
    if "held_out_gain" not in facts:
        return None
    gain, low, high = (facts[f"held_out_gain{end}"] for end in ("", "_low", "_high"))
    verdict = (
        "so the labels helped"
        if low > 0
        else "so the labels did harm: align with more images"
        if high < 0
        else "so these images cannot tell whether the labels helped"
    )
    return (
        f"Aligned with {facts['align_images']:,} labelled images. On {facts['held_out_images']:,} others: alignment "
        f"{facts['held_out_alignment_aligned']:.3f}, plain K-means of {tokenizer.vocab_size} tokens "
        f"{facts['held_out_alignment_plain']:.3f}; gain {gain:+.3f} [{low:+.3f}, {high:+.3f}], {verdict}."
    )


def _part_plan(source: ImageSource, images: np.ndarray, seed: int) -> ImagePlan:
    assert source.labels is not None
    groups = None if source.groups is None else source.groups[images]
    return plan_images(source.labels[images], groups=groups, seed=seed)


def _only(batches: Iterator[Batch], images: np.ndarray) -> Iterator[Batch]:
    """Of each batch the chosen images, numbered by their place among them; labels are the plan's."""
    chosen = torch.from_numpy(images)
    for batch in batches:
        index = batch.index.cpu()
        place = torch.searchsorted(chosen, index)
        known = chosen[place.clamp(max=len(chosen) - 1)] == index
        if bool(known.any()):
            rows = known.nonzero()[:, 0].to(batch.images.device)
            yield Batch(batch.images[rows], place[known].to(batch.index.device), None)


def _fold_tables(counts: TokenCounts) -> np.ndarray:
    """R of each fold, (F, K′, L)."""
    rows = counts.rows().by_cell()
    tables = np.zeros((rows.num_folds, rows.num_classes, counts.vocab_size))
    tables[:, :, rows.tokens] = rows.matrix.toarray().reshape(rows.num_folds, rows.num_classes, -1)
    return tables.transpose(0, 2, 1)
