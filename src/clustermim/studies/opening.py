"""The data sets of a study, each opened once in a process."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from clustermim.data.class_lists import read_class_lists
from clustermim.data.sources import ImageSource, open_source, open_splits
from clustermim.data.splits import take
from clustermim.errors import InputError
from clustermim.evaluation.sealing import Sealed
from clustermim.studies.recipe import DataEntry


class Sources:
    """Opens the data sets of a recipe by name."""

    def __init__(self, entries: Mapping[str, DataEntry]) -> None:
        self.entries = entries
        self._train: dict[str, ImageSource] = {}
        self._test: dict[str, ImageSource] = {}

    def train(self, name: str) -> ImageSource:
        """The training images."""
        if name not in self._train:
            entry = self.entries[name]
            try:
                self._train[name] = open_source(entry.source, entry.options, split="train")
            except InputError as problem:
                raise InputError(f"data: {name}: {problem}") from None
        return self._train[name]

    def test(self, name: str) -> ImageSource:
        """The test images; only where the data set is labelled."""
        if name not in self._test:
            entry = self.entries[name]
            try:
                self._train[name], self._test[name] = open_splits(entry.source, entry.options)
                Sealed(self._train[name], self._test[name])
            except InputError as problem:
                raise InputError(f"data: {name}: {problem}") from None
        return self._test[name]

    def labelled(self, name: str) -> bool:
        """Whether each image has a class."""
        return self.train(name).labels is not None

    def judges(self, name: str) -> tuple[str, ...]:
        """Names of the data sets that encoders of this one are judged on."""
        asked = self.entries[name].judge
        return asked or ((name,) if self.labelled(name) else ())

    def part(self, name: str, images: int | None) -> ImageSource:
        """At most so many training images, drawn in proportion to the classes."""
        train = self.train(name)
        if images is None or images >= len(train):
            return train
        return train.subset(take(np.arange(len(train)), train.labels, images, train.options.split_seed))

    def check(self, name: str) -> None:
        """Open what will be needed, so that a mistake is found before any work.

        Raises
        ------
        InputError
            The images, the labels or the class lists cannot be used.
        """
        entry = self.entries[name]
        train = self.train(name)
        if entry.multi_label is not None:
            read_class_lists(entry.multi_label, train)
        for judge in self.judges(name):
            if not self.labelled(judge):
                raise InputError(
                    f"data: {name}: encoders cannot be judged on {judge!r}: it has no labels. Leave it out of `judge`."
                )
            self.test(judge)

    def options_for(self, name: str, images: int | None = None):  # type: ignore[no-untyped-def]
        """The data options of an entry, for fewer images where that is asked."""
        options = self.entries[name].options
        limits = [one for one in (options.limit, images) if one is not None]
        return replace(options, limit=min(limits)) if limits else options
