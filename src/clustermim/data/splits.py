"""Which images are for training and which for testing: seeded, stratified by class, groups kept whole."""

import numpy as np
import torch

from clustermim.data.counted import Stream, counter_hash
from clustermim.errors import InputError


def seeded_order(seed: int, stream: Stream, count: int) -> np.ndarray:
    """A random order of 0..count-1 that depends only on its arguments."""
    order: np.ndarray = counter_hash(seed, stream, torch.arange(count)).argsort(stable=True).numpy()
    return order


def hold_out(labels: np.ndarray, fraction: float, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Choose the test images, stratified by class.

    Without groups every class gives `fraction` of its images, rounded, and keeps at least one for training; a class
    of two or more gives at least one. With groups, whole groups in random order go to the test set as long as each
    brings the class counts nearer to the wanted ones.

    Parameters
    ----------
    labels
        (n,) int64; -1 (unknown) is a class of its own.
    fraction
        Share of the images to hold out, between 0 and 1.
    seed
        Seed of the choice.
    groups
        (n,) values; images of equal value stay together.

    Returns
    -------
    numpy.ndarray
        (n,) bool, True = test.

    Raises
    ------
    InputError
        When there is only one group.
    """
    order = seeded_order(seed, Stream.SPLIT, len(labels))
    classes, label = np.unique(labels, return_inverse=True)
    test = np.zeros(len(labels), dtype=bool)
    if groups is None:
        for value in range(len(classes)):
            members = order[label[order] == value]
            wanted = round(len(members) * fraction)
            test[members[: min(max(wanted, 1), len(members) - 1)]] = True
        return test
    _, group = np.unique(groups, return_inverse=True)
    count = int(group.max()) + 1
    if count < 2:
        raise InputError(
            "All images belong to one group, so none can be held out for testing: choose another --group, or bring a "
            "test split of your own."
        )
    counts = np.zeros((count, len(classes)))
    np.add.at(counts, (group, label), 1)
    target, taken = counts.sum(0) * fraction, np.zeros(len(classes))
    chosen = np.zeros(count, dtype=bool)
    for candidate in seeded_order(seed, Stream.SPLIT, count):
        if chosen.sum() == count - 1:
            break
        after = taken + counts[candidate]
        if ((target - after) ** 2).sum() < ((target - taken) ** 2).sum():
            chosen[candidate], taken = True, after
    if not chosen.any():
        chosen[int(np.argmin(((target - counts) ** 2).sum(1)))] = True
    return np.asarray(chosen[group])


def take(rows: np.ndarray, labels: np.ndarray | None, limit: int, seed: int) -> np.ndarray:
    """At most `limit` of `rows`, drawn at random and in proportion to the classes, in their old order.

    Parameters
    ----------
    rows
        (n,) rows to choose from.
    labels
        (n,) their labels, or None.
    limit
        How many to keep; every class keeps at least one if the limit allows it.
    seed
        Seed of the choice.
    """
    if limit >= len(rows):
        return rows
    order = seeded_order(seed, Stream.LIMIT, len(rows))
    if labels is None:
        return np.asarray(np.sort(rows[order[:limit]]))
    # The k-th of m images of a class comes at (k + u) / m: any first part of this queue is stratified.
    position = np.empty(len(rows))
    for value in np.unique(labels):
        members = order[labels[order] == value]
        position[members] = np.arange(len(members)) / len(members)
    rank = np.empty(len(rows))
    rank[order] = np.arange(len(rows))
    return np.asarray(np.sort(rows[np.lexsort((rank, position))[:limit]]))
