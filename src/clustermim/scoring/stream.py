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
from clustermim.scoring.folds import ArrayLike, ImagePlan, plan_images
from clustermim.scoring.tcas import TokenScore, check_options, score_counts
from clustermim.tokenizers.processes import Processes


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountedStream:
    """What one pass over the images gave for each tokenizer."""

    counts: Mapping[str, TokenCounts]
    seconds_reading: float
    """Waiting for images, decoded and cut: once for all tokenizers."""
    seconds_tokenizing: Mapping[str, float]
    """Features and nearest centroids."""
    seconds_counting: Mapping[str, float]

    def scores(self, *, bootstrap: int = 0, seed: int = 0) -> dict[str, TokenScore]:
        """The scores; `bootstrap` and `seed` as for `score_tokens`."""
        return {
            name: dataclasses.replace(
                score_counts(one, bootstrap=bootstrap, seed=seed),
                seconds_tokenizing=self.seconds_tokenizing[name],
                seconds_counting=self.seconds_counting[name],
            )
            for name, one in self.counts.items()
        }


def count_stream(
    tokenizers: Mapping[str, Encodes],
    batches: Iterable[Batch],
    plan: ImagePlan,
    *,
    per_image: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> CountedStream:
    """Count the tokens of several tokenizers in one pass.

    In a distributed run each process passes its own part of the images; the counts are gathered and every process
    gets those of all.

    Parameters
    ----------
    tokenizers
        Name -> tokenizer.
    batches
        Views in [0, 1] with their index, every image once: `make_loader(..., train=False).epoch()`.
    plan
        Class and fold of every image, by index.
    per_image
        Keep the counts of each image, which bootstrap and learning curve need.
    on_batch
        Called with the number of images after each batch.

    Raises
    ------
    InputError
        No tokenizer, or a stream that does not match the plan.
    """
    if not tokenizers:
        raise InputError("There is no tokenizer to score: name at least one.")
    counts = {
        name: TokenCounts(plan, tokenizer.vocab_size, per_image=per_image) for name, tokenizer in tokenizers.items()
    }
    tokenizing, counting = dict.fromkeys(tokenizers, 0.0), dict.fromkeys(tokenizers, 0.0)
    reading, since = 0.0, time.perf_counter()
    for batch in batches:
        reading += _clock(batch.images) - since
        for name, tokenizer in tokenizers.items():
            start = _clock(batch.index)
            with torch.no_grad():
                ids = tokenizer.encode(batch.images, index=batch.index, labels=batch.labels)
            middle = _clock(ids)
            counts[name].update(ids, batch.labels if plan.kind == "images" else None, batch.index)
            tokenizing[name] += middle - start
            counting[name] += _clock(ids) - middle
        if on_batch is not None:
            on_batch(len(batch.index))
        since = time.perf_counter()
    for name, one in counts.items():
        start = time.perf_counter()
        one.settle()
        counting[name] += time.perf_counter() - start
    gather(counts)
    return CountedStream(
        counts=counts, seconds_reading=reading, seconds_tokenizing=tokenizing, seconds_counting=counting
    )


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
    """Score several tokenizers in one pass: `count_stream`, then a score of each.

    Parameters
    ----------
    tokenizers, batches, on_batch
        As for `count_stream`.
    labels
        Class of every image of the source, by index.
    num_classes, groups, crossfit, bootstrap, seed
        As for `score_tokens`.

    Raises
    ------
    InputError
        As `score_tokens`; also no tokenizer.
    """
    check_options(bootstrap, seed)
    plan = plan_images(labels, num_classes=num_classes, groups=groups, crossfit=crossfit, seed=seed)
    counted = count_stream(tokenizers, batches, plan, per_image=bootstrap > 0, on_batch=on_batch)
    return counted.scores(bootstrap=bootstrap, seed=seed)


def gather(counts: Mapping[str, TokenCounts]) -> None:
    """Give every process of a distributed run the counts of all; nothing to do in a single process."""
    processes = Processes()
    if processes.size > 1:
        for one in counts.values():
            one.pool(processes)


def count_ids(
    parts: Iterable[tuple[np.ndarray, np.ndarray]], plan: ImagePlan, vocab_size: int, *, per_image: bool = False
) -> TokenCounts:
    """Count stored ids, part by part, so that only one part is in memory.

    Parameters
    ----------
    parts
        (ids (m, N), positions (m,) of those images in the plan).
    plan
        Class and fold of every image.
    vocab_size
        K.
    per_image
        Keep the counts of each image.
    """
    counts = TokenCounts(plan, vocab_size, per_image=per_image)
    for ids, positions in parts:
        counts.update(torch.from_numpy(ids.astype(np.int64)), None, torch.from_numpy(positions.astype(np.int64)))
    return counts


def _clock(tensor: Tensor) -> float:
    """Now, once the device has done what it was asked for."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
