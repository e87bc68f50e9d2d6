"""Who is counted where: the class, the fold and the resampling unit of every image, decided once before counting.

Cross-fitting and the bootstrap are honest only if they agree on what may never be split: an image, or a group of
images (a patient, a slide, a video). So one `ImagePlan` is made from the labels, and everything that counts tokens
reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int64
from scipy import sparse
from torch import Tensor

from clustermim.errors import InputError

MAX_FOLDS = 5

ArrayLike = Tensor | np.ndarray | Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """Class, fold and resampling unit of each image; made by `plan_images`.

    A *unit* is what the folds keep whole and the bootstrap resamples: an image, or a group of images. A *stratum* is
    what units are resampled within: one fold and one class (of a group with several classes: the commonest).
    """

    labels: Int64[np.ndarray, " images"]
    """Class of each image, as a position in `classes`."""
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

    @property
    def cells(self) -> Int64[np.ndarray, " images"]:
        """The row of the count table that the patches of each image go to: fold · L + class."""
        return np.asarray(self.folds * self.num_classes + self.labels)


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
        Integer class of each image, shape (images,), none negative.
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
    given = checked_integers(labels, "labels")
    if given.ndim != 1:
        raise InputError(f"labels must have shape (images,), one class per image; got shape {tuple(given.shape)}.")
    if given.size == 0:
        raise InputError("There are no labelled images: TCAS needs at least two classes of at least one image each.")
    if given.min() < 0:
        raise InputError(
            f"labels holds negative values (lowest {given.min()}, first at image {int(np.argmax(given < 0))}). Classes "
            "are numbered from 0; leave unlabelled images out before scoring."
        )
    if num_classes is not None and given.max() >= num_classes:
        raise InputError(
            f"labels holds class {given.max()}, but num_classes is {num_classes}: labels must lie in "
            f"[0, {num_classes}). Pass a larger num_classes or renumber the labels."
        )
    classes, compact = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise InputError(
            f"All {given.size} images have class {classes[0]}: token scores compare classes, so at least two are "
            "needed. Score on data with two classes or more."
        )
    compact = compact.astype(np.int64)
    notes: list[str] = []
    if num_classes is not None and len(classes) < num_classes:
        notes.append(f"{num_classes - len(classes)} of {num_classes} classes have no image and are left out.")
    if groups is None:
        units, noun = np.arange(given.size, dtype=np.int64), "image"
    else:
        units, noun = _group_units(groups, given.size), "group"
    members = _memberships(units, compact, len(classes))
    units_per_class = np.bincount(members.indices, minlength=len(classes))
    smallest = int(units_per_class.min())
    num_folds = min(MAX_FOLDS, smallest) if crossfit else 0
    if num_folds == 1:
        num_folds = 0
        alone = classes[units_per_class == 1]
        shown = ", ".join(str(c) for c in alone[:5]) + (", ..." if len(alone) > 5 else "")
        notes.append(
            f"Class {shown} has a single {noun}, so nothing can be cross-fitted: plug-in figures only, and they "
            "flatter large vocabularies."
        )
    unit_folds = deal_folds(members, max(1, num_folds), seed)
    strata = unit_folds * len(classes) + np.asarray(members.argmax(axis=1)).ravel().astype(np.int64)
    return ImagePlan(
        labels=compact,
        classes=classes.astype(np.int64),
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


def _memberships(units: np.ndarray, labels: np.ndarray, classes: int) -> sparse.csr_matrix:
    """Images of each class in each unit, sparse: units × classes would not fit for a million images."""
    shape = (int(units.max()) + 1, classes)
    members = sparse.csr_matrix((np.ones(len(units)), (units, labels)), shape=shape)
    members.sum_duplicates()
    return members
