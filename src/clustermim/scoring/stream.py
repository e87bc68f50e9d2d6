"""Scoring tokenizers over a stream of images: one pass over the data, however many tokenizers."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clustermim.data.loaders import Batch
from clustermim.errors import InputError
from clustermim.scoring.counts import TokenCounts
from clustermim.scoring.folds import ArrayLike, plan_images
from clustermim.scoring.tcas import TokenScore, check_options, score_counts


@runtime_checkable
class Encodes(Protocol):
    """What scoring asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """K."""

    def encode(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        index: Int64[Tensor, " b"] | None = None,
        labels: Int64[Tensor, " b"] | None = None,
    ) -> Int64[Tensor, "b n"]:
        """Token of each patch, in [0, K)."""


def score_stream(
    tokenizers: Mapping[str, Encodes],
    batches: Iterable[Batch],
    labels: ArrayLike,
    *,
    num_classes: int | None = None,
    groups: ArrayLike | None = None,
    crossfit: bool = True,
    bootstrap: int = 0,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, TokenScore]:
    """Score several tokenizers in one pass.

    In a distributed run each process passes its own part of the images; the counts are gathered and every process
    gets the same scores.

    Parameters
    ----------
    tokenizers
        Name -> tokenizer.
    batches
        Views in [0, 1] with their index, every image once: `make_loader(..., train=False).epoch()`.
    labels
        Class of every image of the source, by index.
    num_classes, groups, crossfit, bootstrap, seed
        As for `score_tokens`.
    on_batch
        Called with the number of images after each batch.

    Raises
    ------
    InputError
        As `score_tokens`; also no tokenizer.
    """
    check_options(bootstrap, seed)
    if not tokenizers:
        raise InputError("There is no tokenizer to score: name at least one.")
    plan = plan_images(labels, num_classes=num_classes, groups=groups, crossfit=crossfit, seed=seed)
    counts = {
        name: TokenCounts(plan, tokenizer.vocab_size, per_image=bootstrap > 0) for name, tokenizer in tokenizers.items()
    }
    tokenizing, counting = dict.fromkeys(tokenizers, 0.0), dict.fromkeys(tokenizers, 0.0)
    for batch in batches:
        for name, tokenizer in tokenizers.items():
            start = _clock(batch.index)
            with torch.no_grad():
                ids = tokenizer.encode(batch.images, index=batch.index, labels=batch.labels)
            middle = _clock(ids)
            counts[name].update(ids, batch.labels, batch.index)
            tokenizing[name] += middle - start
            counting[name] += _clock(ids) - middle
        if on_batch is not None:
            on_batch(len(batch.index))
    gather(counts)
    return {
        name: dataclasses.replace(
            score_counts(one, bootstrap=bootstrap, seed=seed),
            seconds_tokenizing=tokenizing[name],
            seconds_counting=counting[name],
        )
        for name, one in counts.items()
    }


def gather(counts: Mapping[str, TokenCounts]) -> None:
    """Give every process of a distributed run the counts of all; nothing to do in a single process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    everyone: list[Mapping[str, TokenCounts] | None] = [None] * world
    torch.distributed.all_gather_object(everyone, dict(counts))
    for other, theirs in enumerate(everyone):
        if other != rank and theirs is not None:
            for name, one in theirs.items():
                counts[name].merge(one)


def score_ids(
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    labels: ArrayLike,
    vocab_size: int,
    *,
    num_classes: int | None = None,
    groups: ArrayLike | None = None,
    crossfit: bool = True,
    bootstrap: int = 0,
    seed: int = 0,
) -> TokenScore:
    """Score stored ids, part by part, so that only one part is in memory.

    Parameters
    ----------
    parts
        (ids (m, N), positions (m,) of those images in `labels`).
    labels
        Class of every image.
    vocab_size
        K.
    num_classes, groups, crossfit, bootstrap, seed
        As for `score_tokens`.
    """
    check_options(bootstrap, seed)
    plan = plan_images(labels, num_classes=num_classes, groups=groups, crossfit=crossfit, seed=seed)
    counts = TokenCounts(plan, vocab_size, per_image=bootstrap > 0)
    for ids, positions in parts:
        counts.update(torch.from_numpy(ids.astype(np.int64)), None, torch.from_numpy(positions.astype(np.int64)))
    return score_counts(counts, bootstrap=bootstrap, seed=seed)


def _clock(tensor: Tensor) -> float:
    """Now, once the device has done what it was asked for."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
