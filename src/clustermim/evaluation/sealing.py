"""The test images without their labels: these are handed out once all answers stand, and only then.

Nothing that learns or answers is given more than `Sealed.images`, a source that has no labels at all.
"""

import copy

import numpy as np
import torch

from clustermim.data.sources import ImageSource, require_labels
from clustermim.errors import InputError
from clustermim.evaluation.judging import Truth


class Sealed:
    """The test split of a source, its labels locked away.

    Parameters
    ----------
    train, test
        Both splits, labelled; checked against each other here, before anything is computed.

    Raises
    ------
    InputError
        No labels, a single class in train, or a class that only test has.
    """

    def __init__(self, train: ImageSource, test: ImageSource) -> None:
        known = np.unique(require_labels(train, "Judging an encoder"))
        if test.labels is None:
            require_labels(test, "Judging an encoder")
        _check_classes(test, known)
        self.fingerprint = test.fingerprint()
        self.num_classes = int(known.max()) + 1
        self._source = test
        test.__dict__.setdefault("_resident", {})  # images in memory are shared by the copy
        self.images = copy.copy(test)
        self.images.labels = None

    def reveal(self, seed: int) -> Truth:
        """The labels; the last step of judging an encoder."""
        labels = torch.as_tensor(self._source.labels, dtype=torch.int64)
        return Truth(labels, self._source.groups, self.num_classes, seed)


def _check_classes(test: ImageSource, known: np.ndarray) -> None:
    unseen = np.setdiff1d(np.unique(test.labels if test.labels is not None else []), known)
    if len(unseen):
        names = [str(test.classes[int(c)]) if test.classes else str(int(c)) for c in unseen[:5]]
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        raise InputError(
            f"{len(unseen)} class(es) of the test split of {test.name} have no image in its train split: "
            f"{', '.join(names)}{more}. No protocol can learn them: add training images, or leave these classes out."
        )
