"""Counting which tokens occur in which classes, image by image, as a stream.

Without a bootstrap only the table R[fold, class, token] is kept: dense on the device of the ids while it is small,
else as sparse sorted keys, so that a vocabulary of millions (one token per patch) costs no more than the tokens in
use. With a bootstrap the sparse counts of each image are kept instead, since images will be re-weighted.
Both become the same thing in the end, a `RowCounts`: rows of token counts, each row of one fold and one class.

A batch is only checked and put aside; counting is done a large block at a time, which costs a fraction of it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64
from scipy import sparse
from torch import Tensor

from clustermim.errors import InputError
from clustermim.scoring.folds import ImagePlan
from clustermim.scoring.image_counts import ImageCounts, compact
from clustermim.tokenizers.processes import Processes

# 2^24 int64 cells are 128 MiB; above it the table is kept sparse, as is one of many more cells than there can be ids.
DENSE_CELLS, ALWAYS_DENSE, CELLS_AN_IMAGE = 1 << 24, 1 << 20, 256
# Ids wait, in as few bytes as K allows, until so many are there; they are then counted together.
BLOCK_IDS = 1 << 20
# Pending sparse keys are merged into the table when they outnumber it, and at least this many.
MERGE_AT = 1 << 22


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Token counts in rows, each row belonging to one fold, one class and one resampling unit.

    A row is one image (of several classes: one image and class) when images may be re-weighted, else one
    (fold, class) cell of the count table.
    """

    matrix: sparse.csr_matrix
    """(rows, used tokens) counts, float64."""
    tokens: Int64[np.ndarray, " used"]
    """Token id of each column, ascending; only tokens that occur."""
    row_class: Int64[np.ndarray, " rows"]
    row_fold: Int64[np.ndarray, " rows"]
    num_classes: int
    row_image: Int64[np.ndarray, " rows"] | None = None
    """Image of each row; None where rows are cells."""
    num_folds: int
    """0 when there is no cross-fitting."""

    def by_cell(self) -> "RowCounts":
        """The same counts summed to one row per (fold, class)."""
        cells = self.row_fold * self.num_classes + self.row_class
        total = max(1, self.num_folds) * self.num_classes
        gather = sparse.csr_matrix((np.ones(len(cells)), (cells, np.arange(len(cells)))), shape=(total, len(cells)))
        return RowCounts(
            matrix=(gather @ self.matrix).tocsr(),
            tokens=self.tokens,
            row_class=np.arange(total) % self.num_classes,
            row_fold=np.arange(total) // self.num_classes,
            num_classes=self.num_classes,
            num_folds=self.num_folds,
        )


class TokenCounts:
    """Streaming counts of the tokens of one tokenizer.

    Parameters
    ----------
    plan
        Class and fold of every image, from `plan_images`.
    vocab_size
        K: token ids lie in [0, K).
    per_image
        Keep the sparse counts of each image, which the bootstrap needs. Memory: 8 bytes for each distinct token of
        each image, instead of 8 bytes for each (fold, class, token).
    """

    def __init__(self, plan: ImagePlan, vocab_size: int, *, per_image: bool = False) -> None:
        if vocab_size < 1:
            raise InputError(f"vocab_size must be at least 1; got {vocab_size}.")
        self.plan = plan
        self.vocab_size = vocab_size
        self.per_image = per_image
        self._rows = max(1, plan.num_folds) * plan.num_classes
        size = self._rows * vocab_size
        worth = size <= max(ALWAYS_DENSE, CELLS_AN_IMAGE * plan.num_images)
        self._keeps_table = not per_image and size <= DENSE_CELLS and worth
        self._narrow = narrowest(vocab_size)
        self._folds = torch.from_numpy(plan.folds)
        self._seen = torch.zeros(plan.num_images, dtype=torch.bool)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._waiting_ids = 0
        self._dense: Tensor | None = None
        self._images = ImageCounts()
        self._keys = np.empty(0, dtype=np.int64)
        self._values = np.empty(0, dtype=np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending_size = 0

    @property
    def images(self) -> int:
        """Number of images counted so far."""
        return int(self._seen.sum())

    def update(
        self,
        ids: Int[Tensor, "batch patches"],
        labels: Int[Tensor, " batch"] | None,
        index: Int[Tensor, " batch"],
    ) -> None:
        """Count one batch.

        Parameters
        ----------
        ids
            Token of each patch, in [0, K), on any device.
        labels
            Class of each image, checked against the plan; None to take the plan's, as it must be for other labels.
        index
            Position of each image in the plan.

        Raises
        ------
        InputError
            Ids outside [0, K), an image counted twice or unknown to the plan, labels that differ from the plan's,
            another number of patches than patch labels.
        """
        where = index.detach().cpu().to(torch.int64)
        if ids.shape[0] != where.shape[0]:
            raise InputError(f"ids has {ids.shape[0]} rows but index has {where.shape[0]}: one row of ids per image.")
        if ids.numel() == 0:
            return
        if self.plan.kind == "patches" and ids.shape[1] != self.plan.labels.shape[1]:
            raise InputError(
                f"There are labels for {self.plan.labels.shape[1]} patches of each image, but {ids.shape[1]} tokens: "
                "cut masks and images into the same patches."
            )
        lowest, highest = (int(v) for v in torch.aminmax(ids))
        if lowest < 0 or highest >= self.vocab_size:
            raise InputError(
                f"ids holds token {lowest if lowest < 0 else highest}, outside [0, {self.vocab_size}): the vocabulary "
                f"has {self.vocab_size} tokens. Were these ids made by another tokenizer?"
            )
        if int(where.min()) < 0 or int(where.max()) >= self.plan.num_images:
            raise InputError(
                f"index holds image {int(where.min()) if int(where.min()) < 0 else int(where.max())}, but there are "
                f"{self.plan.num_images} labelled images."
            )
        if bool(self._seen[where].any()) or len(np.unique(where.numpy())) < where.numel():
            raise InputError("An image was counted twice: each image may appear in the stream once.")
        if labels is not None and not np.array_equal(labels.detach().cpu().numpy(), self._known_labels(where)):
            raise InputError("The labels of a batch differ from the labels that the folds were made from.")
        self._seen[where] = True
        if self._waiting and self._waiting[-1][0].shape[1] != ids.shape[1]:
            self.settle()
        self._waiting.append((ids.detach().to(self._narrow), where))
        self._waiting_ids += ids.numel()
        if self._waiting_ids >= BLOCK_IDS:
            self.settle()

    def _known_labels(self, where: Tensor) -> np.ndarray:
        known = self.plan.labels[where.numpy()]
        return np.asarray(self.plan.classes[known] if self.plan.kind == "images" else known)

    def settle(self) -> None:
        """Count the ids that wait for their block to fill; `rows` and `merge` do it too."""
        if not self._waiting:
            return
        ids, where = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._waiting_ids = [], 0
        if self.per_image:
            self._add_images(ids, where)
        else:
            self._add_cells(ids, where)

    def _add_cells(self, ids: Tensor, where: Tensor) -> None:
        if self.plan.kind == "images":
            cells = self._folds[where] * self.plan.num_classes + torch.from_numpy(self.plan.labels[where.numpy()])
            keys = ((cells * self.vocab_size).to(ids.device)[:, None] + ids).flatten()
        else:
            row, member, token = self.plan.spread(ids, where)
            cells = self._folds[where].to(ids.device)[row] * self.plan.num_classes + member
            keys = cells * self.vocab_size + token
        size = self._rows * self.vocab_size
        if not self._keeps_table:
            self._push(*np.unique(keys.cpu().numpy(), return_counts=True))
            return
        if self._dense is None:
            self._dense = torch.zeros(size, dtype=torch.int64, device=ids.device)
        if size <= 4 * len(keys):
            self._dense += torch.bincount(keys, minlength=size)
        else:
            self._dense.scatter_add_(0, keys, torch.ones_like(keys))

    def _add_images(self, ids: Tensor, where: Tensor) -> None:
        if self.plan.kind == "images":
            images = where.numpy()
            pairs = images * self.plan.num_classes + self.plan.labels[images]
            narrow = torch.int64 if self._narrow == torch.int64 else torch.int32
            self._images.add_sorted(ids.to(narrow).cpu().numpy(), pairs)
            return
        row, member, token = (part.cpu().numpy() for part in self.plan.spread(ids, where))
        # Keys of a block fit int64 as long as images × L × K < 9·10^18.
        keys, counts = np.unique(
            (where.numpy()[row] * self.plan.num_classes + member) * self.vocab_size + token, return_counts=True
        )
        pair, token = np.divmod(keys, self.vocab_size)
        pairs, lengths = np.unique(pair, return_counts=True)
        self._images.add(pairs, lengths, token.astype(np.int64 if self._narrow == torch.int64 else np.int32), counts)

    def _push(self, keys: np.ndarray, counts: np.ndarray) -> None:
        self._pending.append((keys, counts.astype(np.int64)))
        self._pending_size += len(keys)
        if self._pending_size > max(MERGE_AT, len(self._keys)):
            self._merge()

    def _merge(self) -> None:
        if not self._pending:
            return
        keys = np.concatenate([self._keys, *(k for k, _ in self._pending)])
        values = np.concatenate([self._values, *(v for _, v in self._pending)])
        self._pending, self._pending_size = [], 0
        self._keys, inverse = np.unique(keys, return_inverse=True)
        self._values = np.bincount(inverse, weights=values, minlength=len(self._keys)).astype(np.int64)

    def merge(self, other: "TokenCounts") -> None:
        """Take in the counts of other images of the same plan: another process, or another shard.

        Raises
        ------
        InputError
            The two were made for different images, vocabularies or purposes, or share an image.
        """
        if (
            self.vocab_size != other.vocab_size
            or self.per_image != other.per_image
            or not np.array_equal(self.plan.folds, other.plan.folds)
            or not np.array_equal(self.plan.labels, other.plan.labels)
        ):
            raise InputError("Only counts of one tokenizer under one plan can be merged.")
        if bool((self._seen & other._seen).any()):
            raise InputError("An image was counted twice: each image may appear in the stream once.")
        self.settle()
        other.settle()
        self._seen |= other._seen
        if other._dense is not None:
            self._dense = other._dense.clone() if self._dense is None else self._dense + other._dense.to(self._dense)
        self._images.extend(other._images)
        other._merge()
        if len(other._keys):
            self._pending.append((other._keys, other._values))
            self._pending_size += len(other._keys)

    def pool(self, processes: Processes) -> None:
        """Take in what the other processes counted under the same plan; all of them must call it together.

        Tables are summed; counts of each image, which no two processes share, are put behind each other in the order
        of the processes.

        Raises
        ------
        InputError
            Two processes counted the same image (in all of them).
        """
        self.settle()
        seen = processes.add(self._seen.to(torch.int64))
        if bool((seen > 1).any()):
            raise InputError("An image was counted twice: each process must be given its own part of the images.")
        self._seen = seen > 0
        if self._keeps_table:
            none = torch.zeros(self._rows * self.vocab_size, dtype=torch.int64)
            self._dense = processes.add(none if self._dense is None else self._dense)
            return
        if self.per_image:
            self._images.pool(processes)
            return
        self._merge()
        keys, values = (processes.join(torch.from_numpy(part)).numpy() for part in (self._keys, self._values))
        self._keys, self._values = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        self._pending, self._pending_size = [(keys, values)], len(keys)

    def rows(self) -> RowCounts:
        """The counts so far, ready to be scored.

        Raises
        ------
        InputError
            Some image of the plan has not been counted.
        """
        missing = self.plan.num_images - self.images
        if missing:
            raise InputError(
                f"{missing} of {self.plan.num_images} labelled images have no tokens: ids and labels differ in length."
            )
        self.settle()
        known: dict[str, Any] = {"num_classes": self.plan.num_classes, "num_folds": self.plan.num_folds}
        if self.per_image:
            pairs, tokens, matrix = self._images.matrix(self.vocab_size)
            known["row_image"], known["row_class"] = np.divmod(pairs, self.plan.num_classes)
            known["row_fold"] = self.plan.folds[known["row_image"]]
            return RowCounts(matrix=matrix, tokens=tokens, **known)
        if self._dense is not None:
            flat = self._dense.cpu().numpy()
            keys = np.flatnonzero(flat)
            values = flat[keys]
        else:
            self._merge()
            keys, values = self._keys, self._values
        row, token = np.divmod(keys, self.vocab_size)
        tokens, column = compact(token, self.vocab_size)
        known["row_fold"], known["row_class"] = np.divmod(np.arange(self._rows), self.plan.num_classes)
        matrix = sparse.csr_matrix((values.astype(np.float64), (row, column)), shape=(self._rows, len(tokens)))
        return RowCounts(matrix=matrix, tokens=tokens.astype(np.int64), **known)


def narrowest(vocab_size: int) -> torch.dtype:
    """The smallest integers that hold every id below K."""
    if vocab_size <= 1 << 8:
        return torch.uint8
    return torch.int16 if vocab_size <= 1 << 15 else torch.int32 if vocab_size <= 1 << 31 else torch.int64
