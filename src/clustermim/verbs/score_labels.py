"""What the images of `clustermim tcas` are labelled with: a class each, a class for each patch, or several classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clustermim.data.class_lists import read_class_lists
from clustermim.data.mask_images import IGNORED, MaskImages
from clustermim.data.sources import ImageSource, require_labels
from clustermim.errors import InputError
from clustermim.scoring.dense import mask_labels
from clustermim.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Images that have labels, and the labels."""

    source: ImageSource
    labels: np.ndarray
    """As `plan_images` takes them."""
    names: Sequence[str] | None
    """Name of each label; None where only numbers are known."""
    note: str | None = None
    """What the reader must be told."""


def check_labels(masks: Any, ignore_index: int, multi_label: Any, ids: Any) -> None:
    """Refuse options that contradict each other.

    Raises
    ------
    InputError
        Two kinds of labels, labels beside stored ids, which bring their own, or an ignored value of no masks.
    """
    if masks is not None and multi_label is not None:
        raise InputError("Give either --masks (a class for each patch) or --multi-label (several an image), not both.")
    if ids is not None and (masks is not None or multi_label is not None):
        raise InputError("--masks and --multi-label go with --tokenizer and --data; stored ids bring their own labels.")
    if masks is None and ignore_index != IGNORED:
        raise InputError("--ignore-index is the value of pixels without a class: give --masks.")


def label_images(
    source: ImageSource, tokenizers: Mapping[str, Tokenizer], masks: Any, ignore_index: int, multi_label: Any
) -> Labelled:
    """The labels of a source, from masks or a file of class lists where they are given.

    Parameters
    ----------
    source
        Images.
    tokenizers
        What is to be scored; masks are cut into their patches.
    masks, ignore_index, multi_label
        As for `tcas`.

    Raises
    ------
    InputError
        No labels, masks that do not fit, tokenizers of different patches, an image that is not named.
    """
    for one in tokenizers.values():
        if "labels" in one.requires:
            require_labels(source, f"A tokenizer of kind {one.kind!r}")
    if masks is not None:
        sides = sorted({one.patch_size for one in tokenizers.values()})
        if len(sides) > 1:
            raise InputError(
                f"Masks are cut into one patch size, but the tokenizers have {' and '.join(map(str, sides))}: score "
                "those of one patch size at a time."
            )
        return Labelled(
            source=source,
            labels=mask_labels(MaskImages(masks, source), source.view, sides[0], ignore_index),
            names=None,
        )
    if multi_label is None:
        return Labelled(source=source, labels=require_labels(source, "TCAS"), names=source.classes)
    lists = read_class_lists(multi_label, source)
    kept = np.flatnonzero(lists.members.any(axis=1))
    without = len(source) - len(kept)
    note = f"{without} of {len(source)} images belong to no class and are left out." if without else None
    if not len(kept):
        raise InputError(f"--multi-label names no class for any of the {len(source)} images of {source.name}.")
    part = source.subset(kept) if without else source
    return Labelled(source=part, labels=lists.members[kept], names=lists.names, note=note)
