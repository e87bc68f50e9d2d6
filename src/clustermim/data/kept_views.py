"""Views that are the same in every epoch, kept in memory from the first time that they are read.

A fit passes over the same views many times, and who fits, scores and judges in one process reads them again each time:
decoding photos would take most of that.
"""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from clustermim.data.sources import ImageSource
from clustermim.data.views import ViewConfig


class KeptViews:
    """The eval views of one size of all images of a collection, as far as they have been read."""

    def __init__(self, count: int, reading: tuple[Any, ...], size: tuple[int, ...]) -> None:
        self.reading = reading
        self._views: Float[Tensor, "n c h w"] = torch.empty((count, *size))  # takes memory as it is filled
        self._there: Bool[Tensor, " n"] = torch.zeros(count, dtype=torch.bool)

    def has(self, rows: Int64[Tensor, " b"]) -> bool:
        """Whether all of these are there."""
        return bool(self._there[rows].all())

    def put(self, rows: Int64[Tensor, " b"], views: Float[Tensor, "b c h w"]) -> None:
        """Keep the views of these rows of the collection."""
        self._views[rows] = views
        self._there[rows] = True

    def get(self, rows: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Copies of the views of these rows."""
        return self._views[rows]


_kept: "WeakKeyDictionary[Any, KeptViews]" = WeakKeyDictionary()


def kept_views(source: ImageSource, view: ViewConfig, most: float) -> KeptViews | None:
    """Where the eval views of the images of a source are kept.

    They live as long as the collection that the source is a part of, and are shared by all its parts; those of another
    size, or read otherwise, take their place.

    Parameters
    ----------
    source
        Images.
    view
        Its size and channels count; the eval view depends on nothing else.
    most
        Bytes that the views of the whole collection may take.

    Returns
    -------
    KeptViews or None
        None if they would take more.
    """
    store, size = source.collection.store, (view.channels, *view.image_size)
    reading = (size, source.channels, source.options.value_range)
    found = _kept.get(store)
    if found is not None and found.reading == reading:
        return found
    _kept.pop(store, None)
    if 4.0 * float(np.prod(size)) * len(store) > most:
        return None
    return _kept.setdefault(store, KeptViews(len(store), reading, size))
