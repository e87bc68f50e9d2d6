"""Views that are the same in every epoch, kept in memory from the first time that they are read.

A fit passes over the same views many times, and who fits, scores and judges in one process reads them again each time:
decoding photos would take most of that.
"""

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from clustermim.data.sources import ImageSource
from clustermim.data.views import ViewConfig


class KeptViews:
    """The eval views of a range of images, as far as they have been read."""

    def __init__(self, span: range, view: ViewConfig) -> None:
        self.span, self.size = span, (view.channels, *view.image_size)
        self._views: Float[Tensor, "n c h w"] = torch.empty((len(span), *self.size))  # takes memory as it is filled
        self._there: Bool[Tensor, " n"] = torch.zeros(len(span), dtype=torch.bool)

    def has(self, index: Int64[Tensor, " b"]) -> bool:
        """Whether all of these images are there."""
        return bool(self._there[index - self.span.start].all())

    def put(self, index: Int64[Tensor, " b"], views: Float[Tensor, "b c h w"]) -> None:
        """Keep the views of these images."""
        self._views[index - self.span.start] = views
        self._there[index - self.span.start] = True

    def get(self, index: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Copies of the views of these images."""
        return self._views[index - self.span.start]


_kept: "WeakKeyDictionary[ImageSource, KeptViews]" = WeakKeyDictionary()


def kept_views(source: ImageSource, view: ViewConfig, span: range, most: float) -> KeptViews | None:
    """Where the eval views of these images of a source are kept.

    Parameters
    ----------
    source
        Images; as long as it lives, so do its views, those of the last size asked for.
    view
        Its size and channels count; the eval view depends on nothing else.
    span
        Indices of the images.
    most
        Bytes that they may take.

    Returns
    -------
    KeptViews or None
        None if they would take more.
    """
    found = _kept.get(source)
    if found is not None and (found.span, found.size) == (span, (view.channels, *view.image_size)):
        return found
    _kept.pop(source, None)
    if 4.0 * view.channels * view.image_size[0] * view.image_size[1] * len(span) > most:
        return None
    return _kept.setdefault(source, KeptViews(span, view))
