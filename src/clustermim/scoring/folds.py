"""Who is counted where: the class, the fold and the resampling unit of every image, decided once before counting.

Cross-fitting and the bootstrap are honest only if they agree on what may never be split: an image, or a group of
images (a patient, a slide, a video). So one `ImagePlan` is made from the labels, and everything that counts tokens
reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64, Integer
from scipy import sparse
from torch import Tensor

from clustermim.errors import InputError

MAX_FOLDS = 5

Kind = Literal["images", "patches", "many"]
ArrayLike = Tensor | np.ndarray | Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """Class, fold and resampling unit of each image; made by `plan_images`.

    A *unit* is what the folds keep whole and the bootstrap resamples: an image, or a group of images. A *stratum* is
    what units are resampled within: one fold and one class (of a group with several classes: the commonest).
    """

    kind: Kind
    """What is labelled: an image (one class), a patch (`patches`), or an image with any number of classes (`many`)."""
    labels: Int64[np.ndarray, "..."]
    """As positions in `classes`: (images,); for `patches` (images, N), −1 where ignored; for `many` (images, L) 0/1."""
    classes: Int64[np.ndarray, " classes"]
    """The label values that occur, ascending. A class without an image takes no part in any score."""
    folds: Int64[np.ndarray, " images"]
    """Fold of each image, in [0, max(1, num_folds))."""
    num_folds: int
    """Number of folds; 0 when there is no cross-fitting."""
    units: Int64[np.ndarray, " images"]
    """Resampling unit of each image."""
    strata: Int64[np.ndarray, " units"]
    """Stratum of each unit."""
    notes: tuple[str, ...] = field(default=())
    """What the reader of a score must be told."""

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """L, the number of classes that occur."""
        return len(self.classes)

    def spread(
        self, ids: Integer[Tensor, "batch patches"], where: Int64[Tensor, " batch"]
    ) -> tuple[Int64[Tensor, " m"], Int64[Tensor, " m"], Integer[Tensor, " m"]]:
        """What is to be counted of a batch: row in the batch, class and token of each labelled patch.

        A patch without label is left out; a patch of an image of several classes is counted in each of them.
        """
        if self.kind == "many":
            row, member = torch.from_numpy(self.labels[where.numpy()]).to(ids.device).nonzero(as_tuple=True)
            shape = (len(row), ids.shape[1])
            return row[:, None].expand(shape).flatten(), member[:, None].expand(shape).flatten(), ids[row].flatten()
        member = torch.from_numpy(self.labels[where.numpy()]).to(ids.device)
        row = torch.arange(len(where), device=ids.device)[:, None].expand(ids.shape)
        if self.kind == "images":
            return row.flatten(), member[:, None].expand(ids.shape).flatten(), ids.flatten()
        kept = member >= 0
        return row[kept], member[kept], ids[kept]

    def part(self, images: Int64[np.ndarray, " part"], seed: int) -> "ImagePlan":
        """A plan for some of the images, cut into folds anew; its `classes` are positions in those of this plan."""
        labels = self.labels[images]
        return plan_images(labels.astype(bool) if self.kind == "many" else labels, groups=self.units[images], seed=seed)


def plan_images(
    labels: ArrayLike,
    *,
    num_classes: int | None = None,
    groups: ArrayLike | None = None,
    crossfit: bool = True,
    seed: int = 0,
) -> ImagePlan:
    """Decide folds and resampling units from the labels.

    F = min(5, units in the smallest class) folds, dealt within each class so that every fold holds every class.

    Parameters
    ----------
    labels
        One class per image: integers from 0, (images,). Or one per patch: integers from 0, (images, N), −1 where the
        patch is to be ignored. Or any number per image: bool, (images, L).
    num_classes
        Number of classes the labels come from; a label at or above it is an error. Default: no check.
    groups
        One value per image; images that share a value are never split between folds and are resampled together.
    crossfit
        False: no folds, plug-in figures only.
    seed
        Seed of the dealing.

    Returns
    -------
    ImagePlan
        With `num_folds` 0 and a note when a class has a single image (or group), which cannot be cross-fitted.

    Raises
    ------
    InputError
        Labels that are missing, negative, not integers, too large, or all of one class; groups of another length.
    """
    kind, given = _checked_labels(labels)
    found = np.flatnonzero(given.any(axis=0)) if kind == "many" else np.unique(given[given >= 0])
    known = given.shape[1] if kind == "many" else num_classes
    if kind != "many" and num_classes is not None and given.max() >= num_classes:
        raise InputError(
            f"labels holds class {given.max()}, but num_classes is {num_classes}: labels must lie in "
            f"[0, {num_classes}). Pass a larger num_classes or renumber the labels."
        )
    if len(found) < 2:
        what = f"class {found[0]}" if len(found) else "no class"
        raise InputError(
            f"All {len(given)} images have {what}: token scores compare classes, so at least two are needed. Score on "
            "data with two classes or more."
        )
    compact = given[:, found] if kind == "many" else np.where(given < 0, -1, np.searchsorted(found, given))
    notes: list[str] = []
    if known is not None and len(found) < known:
        notes.append(f"{known - len(found)} of {known} classes have no image and are left out.")
    if groups is None:
        units, noun = np.arange(len(given), dtype=np.int64), "image"
    else:
        units, noun = _group_units(groups, len(given)), "group"
    members = _memberships(units, compact, kind, len(found))
    units_per_class = np.bincount(members.indices, minlength=len(found))
    smallest = int(units_per_class.min())
    num_folds = min(MAX_FOLDS, smallest) if crossfit else 0
    if num_folds == 1:
        num_folds = 0
        alone = found[units_per_class == 1]
        shown = ", ".join(str(c) for c in alone[:5]) + (", ..." if len(alone) > 5 else "")
        notes.append(
            f"Class {shown} has a single {noun}, so nothing can be cross-fitted: plug-in figures only, and they "
            "flatter large vocabularies."
        )
    unit_folds = deal_folds(members, max(1, num_folds), seed)
    strata = unit_folds * len(found) + np.asarray(members.argmax(axis=1)).ravel().astype(np.int64)
    return ImagePlan(
        kind=kind,
        labels=compact.astype(np.int64),
        classes=found.astype(np.int64),
        folds=unit_folds[units],
        num_folds=num_folds,
        units=units,
        strata=strata,
        notes=tuple(notes),
    )


def deal_folds(members: sparse.csr_matrix, folds: int, seed: int) -> Int64[np.ndarray, " units"]:
    """Deal units to folds so that every class is spread as evenly as it can be.

    Units are shuffled, large ones first, and each goes to the fold that holds least of its own classes (then least
    of all). Units of one class each therefore reach every fold as soon as the class has that many units.

    Parameters
    ----------
    members
        Images of each class in each unit, (units, classes).
    folds
        Number of folds.
    seed
        Seed of the shuffle.
    """
    units, classes = members.shape
    if folds < 2:
        return np.zeros(units, dtype=np.int64)
    order = np.random.default_rng([seed, 1]).permutation(units)
    dealt = np.empty(units, dtype=np.int64)
    if members.nnz == units and bool((members.data == 1).all()):
        # Single images: dealing round and round, class after class, is what the greedy rule below would do.
        order = order[np.argsort(members.indices[order], kind="stable")]
        dealt[order] = np.arange(units) % folds
        return dealt
    sizes = np.asarray(members.sum(axis=1)).ravel()
    order = order[np.argsort(-sizes[order], kind="stable")]
    class_sizes = np.asarray(members.sum(axis=0)).ravel()
    held = np.zeros((folds, classes))
    total = np.zeros(folds)
    for unit in order:
        row = slice(members.indptr[unit], members.indptr[unit + 1])
        own, share = members.indices[row], members.data[row] / class_sizes[members.indices[row]]
        load = held[:, own] @ share
        least = np.flatnonzero(load <= load.min() + 1e-12)
        fold = least[np.argmin(total[least])]
        dealt[unit] = fold
        held[fold, own] += share
        total[fold] += sizes[unit]
    return dealt


def checked_integers(values: ArrayLike, name: str) -> np.ndarray:
    """`values` as an int64 array.

    Raises
    ------
    InputError
        NaN or infinite values, fractions, or something that is no array of numbers.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InputError(f"{name} must be a rectangular array of integers; its rows differ in length.") from error
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds NaN or infinite values; it must hold integers. Drop those images first.")
        if (array != np.floor(array)).any():
            raise InputError(f"{name} holds fractions (such as {array[array != np.floor(array)][0]}); give integers.")
    elif array.dtype.kind not in "iub":
        raise InputError(f"{name} must be an array of integers; got dtype {array.dtype}.")
    return array.astype(np.int64)


def _group_units(groups: ArrayLike, images: int) -> Int64[np.ndarray, " images"]:
    array = groups.detach().cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if array.ndim != 1 or len(array) != images:
        raise InputError(f"groups must have one value per image: got shape {array.shape} for {images} images.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError("groups holds NaN or infinite values: every image needs a group.")
    return np.unique(array, return_inverse=True)[1].astype(np.int64)


def _checked_labels(labels: ArrayLike) -> tuple[Kind, np.ndarray]:
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    if isinstance(labels, np.ndarray) and labels.dtype == bool and labels.ndim == 2:
        if not labels.size or not labels.any(axis=1).all():
            raise InputError("Some image belongs to no class: leave images without a class out before scoring.")
        return "many", labels
    given = checked_integers(labels, "labels")
    if given.ndim not in (1, 2):
        raise InputError(
            "labels must have shape (images,), one class per image, (images, patches), one per patch, or be bool of "
            f"shape (images, classes); got shape {tuple(given.shape)}."
        )
    if given.size == 0:
        raise InputError("There are no labelled images: TCAS needs at least two classes of at least one image each.")
    least = 0 if given.ndim == 1 else -1
    if given.min() < least:
        first = int(np.argwhere(given < least)[0, 0])
        raise InputError(
            f"labels holds negative values (lowest {given.min()}, first at image {first}). Classes are numbered from "
            "0; leave unlabelled images out before scoring" + (", and mark patches to ignore by -1." if least else ".")
        )
    return ("images" if given.ndim == 1 else "patches"), given


def _memberships(units: np.ndarray, labels: np.ndarray, kind: Kind, classes: int) -> sparse.csr_matrix:
    """Images (or patches) of each class in each unit, sparse: units × classes would not fit for a million images."""
    if kind == "many":
        row, member = np.nonzero(labels)
    elif kind == "patches":
        row, patch = np.nonzero(labels >= 0)
        member = labels[row, patch]
    else:
        row, member = np.arange(len(labels)), labels
    shape = (int(units.max()) + 1, classes)
    members = sparse.csr_matrix((np.ones(len(row)), (units[row], member)), shape=shape)
    members.sum_duplicates()
    return members
