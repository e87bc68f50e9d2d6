"""One resolver for every verb: a name, a path, an array or a Dataset becomes a map-style dataset of (image, label).

`open_source` finds out what it was given, looks at the images before any work starts, splits them, and settles how
they are viewed. Images come as (C, H, W) tensors, uint8 or float32 in [0, 1].
"""

import hashlib
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.data import Dataset

from clustermim.data import checking
from clustermim.data.arrays import ArrayStore
from clustermim.data.collection import Collection
from clustermim.data.counted import Stream
from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.pixels import BadImage, OutOfRange, adapt_channels, out_of_range_error, to_unit
from clustermim.data.resolving import DataLike, Split, collect
from clustermim.data.splits import hold_out, seeded_order, take
from clustermim.data.views import ViewConfig
from clustermim.errors import InputError

__all__ = ["DataLike", "ImageSource", "Split", "open_source", "open_splits", "require_labels"]

_DEFAULT_SIZE = 224  # pixels, where the images differ in size


class ImageSource(Dataset[tuple[Tensor, int | None]]):
    """The images of one split of a source, as (image, label or None); picklable for worker processes."""

    def __init__(
        self,
        collection: Collection,
        options: DataOptions,
        findings: checking.Findings,
        channels: int,
        split: Split,
        rows: np.ndarray,
        train_rows: np.ndarray,
        groups: np.ndarray | None,
    ) -> None:
        self.collection, self.options = collection, options
        self.split: Split = split
        self.channels = channels
        self.skipped: list[tuple[str, str]] = [
            *collection.skipped,
            *((collection.store.label_of(row), reason) for row, reason in sorted(findings.bad.items())),
        ]
        self._rows, self._train_rows, self._findings = rows, train_rows, findings
        labels = None if collection.labels is None else collection.labels[rows]
        if labels is not None and (labels < 0).any():
            if (labels >= 0).any():
                raise InputError(
                    f"{int((labels < 0).sum())} of {len(labels)} images of the {split} split of {self.name} have no "
                    f"label: label all of them, or none."
                )
            labels = None
        self.labels: np.ndarray | None = labels
        self.groups: np.ndarray | None = None if groups is None else groups[rows]

    @property
    def name(self) -> str:
        """What the source was opened as."""
        return self.collection.name

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Name of each label, or None without labels."""
        return self.collection.classes if self.labels is not None else None

    @property
    def rows(self) -> np.ndarray:
        """Row of each image in `collection`."""
        return self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Shaped[Tensor, "c h w"], int | None]:
        """One image (C, H, W), uint8 or float32 in [0, 1], and its label.

        Raises
        ------
        InputError
            When an image that was not checked at opening cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        row = int(self._rows[index])
        try:
            image = to_unit(self.collection.store.read(row), self.options.value_range)
        except OutOfRange as problem:
            raise out_of_range_error(self.name, problem.low, problem.high, problem.kind) from None
        except BadImage as problem:
            raise InputError(
                f"{self.collection.store.label_of(row)} of {self.name} cannot be read: {problem}. Images of a source "
                f"this large are not all checked when it is opened; repair or remove this one."
            ) from None
        return adapt_channels(image, self.channels), None if self.labels is None else int(self.labels[index])

    def size_of(self, index: int) -> tuple[int, int]:
        """(height, width) of one image as stored; it is decoded only where it was not looked at when opening."""
        height, width = self._findings.shapes[int(self._rows[index]), 1:]
        if height == 0:
            height, width = self[index][0].shape[-2:]
        return int(height), int(width)

    def subset(self, places: np.ndarray) -> "ImageSource":
        """Some of the images, by their places in this source and in that order; viewed as these are."""
        part = ImageSource(
            self.collection,
            self.options,
            self._findings,
            self.channels,
            self.split,
            self._rows[places],
            self._train_rows,
            None,
        )
        part.groups = None if self.groups is None else self.groups[places]
        part.__dict__["view"] = self.view  # measured once
        return part

    def whole(self) -> Shaped[Tensor, "n c h w"] | None:
        """All images at once where they are in memory as one array, else None."""
        store = self.collection.store
        if not isinstance(store, ArrayStore):
            return None
        try:
            return adapt_channels(to_unit(store.block(self._rows), self.options.value_range), self.channels)
        except BadImage:
            return None  # reading them one by one names the bad one

    @cached_property
    def view(self) -> ViewConfig:
        """How the images are viewed: the options, and where they are silent what suits this source."""
        options = self.options
        mean, std = options.mean, options.std
        if mean is None or std is None:
            measured = self._measure()
            mean, std = mean or measured[0], std or measured[1]
        return ViewConfig(
            image_size=options.size or self.common_size or (_DEFAULT_SIZE, _DEFAULT_SIZE),
            channels=self.channels,
            mean=tuple(mean),
            std=tuple(std),
            flip=self.collection.flip if options.flip is None else options.flip,
            crop_scale=self.collection.crop_scale if options.crop_scale is None else options.crop_scale,
        )

    @property
    def common_size(self) -> tuple[int, int] | None:
        """(height, width) if all images that were looked at have the same, else None."""
        sizes = self._findings.shapes[:, 1:]
        sizes = np.unique(sizes[sizes[:, 0] > 0], axis=0)
        return (int(sizes[0, 0]), int(sizes[0, 1])) if len(sizes) == 1 else None

    def _measure(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over up to 2,000 training images, each image counting alike."""
        # In the order of the check at opening, so that most of them are measured already.
        order = seeded_order(0, Stream.SAMPLE, len(self.collection.store))
        rows = order[np.isin(order, self._train_rows)][: checking.SAMPLE]
        moments = self._findings.moments
        missing = np.array([row for row in np.sort(rows) if int(row) not in moments], dtype=np.int64)
        if len(missing):
            known_bad = len(self._findings.bad)
            checking.measure(self.collection, self.options, missing, self._findings)
            if len(self._findings.bad) > known_bad:
                broken = [row for row in missing if int(row) in self._findings.bad]
                named = [(self.collection.store.label_of(int(row)), self._findings.bad[int(row)]) for row in broken]
                raise checking.bad_images_error(self.collection, named, len(missing))
        found = [moments[int(row)] for row in rows]
        mean = np.mean([np.broadcast_to(first, self.channels) for first, _ in found], axis=0)
        square = np.mean([np.broadcast_to(second, self.channels) for _, second in found], axis=0)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        std[std < 1e-6] = 1.0  # a constant channel is only shifted
        return tuple(round(float(value), 6) for value in mean), tuple(round(float(value), 6) for value in std)

    def fingerprint(self) -> str:
        """Identifies the images and labels: contents (or names and sizes), split, channels and value range.

        How they are viewed is not part of it, nor where the files lie.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        self.collection.store.identify(digest)
        digest.update(np.ascontiguousarray(self._rows, dtype=np.int64).tobytes())
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels).tobytes())
        digest.update(f"{self.split} {self.channels} {self.options.value_range}".encode())
        return digest.hexdigest()

    def skipped_message(self) -> str | None:
        """One sentence on the files that were left out, or None."""
        if not self.skipped:
            return None
        return f"{len(self.skipped)} file(s) of {self.name} skipped: {checking.name_some(self.skipped)}."

    def __getstate__(self) -> dict[str, Any]:
        """Only what reading images takes: not what a loader keeps in memory, nor the measurements."""
        state = {key: value for key, value in self.__dict__.items() if key != "_resident"}
        state["collection"] = replace(self.collection, group_field=None)
        state["_findings"] = replace(self._findings, moments={})
        return state


def open_source(data: DataLike, options: DataOptions = DEFAULTS, *, split: Split | None = None) -> ImageSource:
    """Open images from anywhere.

    Parameters
    ----------
    data
        `digits`; `fashion-mnist`; a path: folder of class folders (with or without train/ and test/), flat folder, zip
        of either, parquet file or folder, `.npz` with `x` and optionally `y`, TIFF; each with an optional `#train`,
        `#test` or `#all` behind it. In Python also an array (n, H, W[, C]), a tensor (n, C, H, W), a pair (images,
        labels), or a map-style Dataset.
    options
        How images are read, split and viewed.
    split
        Which split; None takes the one behind `#`, else train.

    Returns
    -------
    ImageSource
        With labels, groups, view, and the files that were skipped.

    Raises
    ------
    InputError
        When there is nothing there that can be used; says what, where, and what to do.
    """
    return _Opened(data, options, split).source(None)


def open_splits(data: DataLike, options: DataOptions = DEFAULTS) -> tuple[ImageSource, ImageSource]:
    """Open the train and the test split of one source.

    Raises
    ------
    InputError
        As `open_source`; also when the source names one split with `#`, or has no test split and no labels to hold
        one out by.
    """
    opened = _Opened(data, options, None)
    if opened.suffix is not None:
        raise InputError(
            f"{data} names the split {opened.suffix!r}, but training and test images are both needed: "
            f"leave out #{opened.suffix}."
        )
    return opened.source("train"), opened.source("test")


def require_labels(source: ImageSource, what: str) -> np.ndarray:
    """The labels of a source, for something that cannot do without.

    Parameters
    ----------
    source
        Images.
    what
        What needs the labels, as the subject of a sentence: "TCAS".

    Raises
    ------
    InputError
        When there are no labels, or only one class.
    """
    if source.labels is None:
        raise InputError(
            f"{what} needs labelled images, but {source.name} ({source.split}) has no labels: "
            f"{source.collection.unlabelled_because}. Put the images into one folder for each class, or bring a label "
            f"column (parquet) or an array 'y' (.npz)."
        )
    present = np.unique(source.labels)
    if len(present) < 2:
        only = source.classes[int(present[0])] if source.classes else str(present[0])
        raise InputError(
            f"{what} compares classes, but {source.name} ({source.split}) holds a single class, {only!r}: "
            f"bring images of at least two."
        )
    return source.labels


class _Opened:
    """A source that is listed and looked at, from which splits are taken."""

    def __init__(self, data: DataLike, options: DataOptions, split: Split | None) -> None:
        self.suffix: Split | None = None
        if isinstance(data, ImageSource):
            self.suffix = split or data.split
            self.collection, self.findings = data.collection, data._findings
            options = data.options if options == DEFAULTS else options
        else:
            self.collection, self.suffix = collect(data, options)
            if split is not None and self.suffix not in (None, split):
                raise InputError(f"{data} names the split {self.suffix!r}, but {split!r} is asked for: leave out one.")
            self.suffix = split or self.suffix
            self.findings = checking.examine(self.collection, options)
        self.options = options
        self.channels = checking.choose_channels(self.collection, options, self.findings)
        checking.refuse_bad(self.collection, options, self.findings, self.collection.skipped)
        good = np.ones(len(self.collection.store), dtype=bool)
        good[list(self.findings.bad)] = False
        self.groups = self._groups()
        self.test = self._test_rows(good)
        self.good = good

    def _groups(self) -> np.ndarray | None:
        if self.options.group is None:
            return None
        if self.collection.group_field is None:
            raise InputError(
                f"--group {self.options.group!r} cannot be used with {self.collection.name}: it has no "
                f"folders, columns or named arrays to group by."
            )
        return self.collection.group_field(self.options.group)

    def _test_rows(self, good: np.ndarray) -> np.ndarray | None:
        """True for test images; None where there are none and nothing to hold out by."""
        collection = self.collection
        if collection.given_split is not None:
            for name in ("test", "val"):
                if (collection.given_split == name).any():
                    return np.asarray(collection.given_split == name)
        if collection.labels is None or not (collection.labels >= 0).any():
            return None
        rows = np.flatnonzero(good & (collection.labels >= 0))
        test = np.zeros(len(good), dtype=bool)
        groups = None if self.groups is None else self.groups[rows]
        test[rows] = hold_out(collection.labels[rows], self.options.test_fraction, self.options.split_seed, groups)
        return test

    def source(self, split: Split | None) -> ImageSource:
        """One split."""
        split = split or self.suffix or "train"
        collection, options = self.collection, self.options
        train = self.good.copy() if self.test is None else self.good & ~self.test
        if collection.given_split is not None and self.test is not None:
            train &= collection.given_split == "train"
        if split == "test" and self.test is None:
            raise InputError(
                f"{collection.name} has no test split, and without labels none is held out: "
                f"{collection.unlabelled_because}. Use #train, or bring a test/ folder or labels."
            )
        if split == "test":
            chosen = self.good & self.test
        else:
            chosen = train if split == "train" else self.good
        rows = np.flatnonzero(chosen)
        if not len(rows):
            raise InputError(f"The {split} split of {collection.name} is empty: it takes more images.")
        if options.limit is not None:
            labels = None if collection.labels is None else collection.labels[rows]
            rows = take(rows, labels, options.limit, options.split_seed)
        train_rows = np.flatnonzero(train) if train.any() else rows
        return ImageSource(collection, options, self.findings, self.channels, split, rows, train_rows, self.groups)
