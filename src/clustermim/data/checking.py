"""Looking at images before work starts: which are broken, what shape they have, their mean and standard deviation."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from clustermim.data.arrays import ArrayStore
from clustermim.data.collection import Collection
from clustermim.data.counted import Stream
from clustermim.data.options import DataOptions
from clustermim.data.pixels import BadImage, OutOfRange, adapt_channels, convertible, out_of_range_error, to_unit
from clustermim.data.remembering import WORTH_KEEPING, LooksKept
from clustermim.data.splits import seeded_order
from clustermim.data.views import to_float
from clustermim.errors import InputError

FULL_CHECK = 50_000
"""Files of a folder or zip up to which every one is decoded when the source is opened."""
GLANCE_CHECK = 1_000_000
"""Rows of a table up to which the first and last bytes of every image are looked at when the source is opened."""
SAMPLE = 2_000
"""Images measured for mean, standard deviation, size and channels."""
MOST_BAD = 0.1
"""Share of bad images above which a source is refused."""

_BLOCK = 256  # images of an array measured at once

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Findings:
    """What is known about each image of a collection."""

    shapes: np.ndarray
    """(n, 3) int32: C, H, W; 0 = not looked at."""
    bad: dict[int, str]
    """Row -> reason."""
    moments: dict[int, tuple[np.ndarray, np.ndarray]]
    """Row -> mean and mean square of each channel, of the image in [0, 1]."""
    looked: int
    """Images looked at when the source was opened."""


def threads() -> int:
    """Threads for decoding; Pillow lets go of the interpreter lock while it decodes."""
    return min(16, os.cpu_count() or 1)


def in_threads(work: Callable[[int], T], rows: Sequence[int] | np.ndarray) -> Iterable[T]:
    """`work` of each row, in order, decoded in threads in blocks of 64."""
    blocks = [rows[start : start + 64] for start in range(0, len(rows), 64)]
    if len(blocks) <= 1:
        yield from (work(int(row)) for row in rows)
        return
    with ThreadPoolExecutor(threads()) as pool:
        # A bounded number of blocks waits, so that memory does not fill up with results.
        ahead = 4 * threads()
        waiting = [pool.submit(lambda block: [work(int(row)) for row in block], block) for block in blocks[:ahead]]
        for place in range(len(blocks)):
            result = waiting[place].result()
            waiting[place] = None  # type: ignore[call-overload]
            if place + ahead < len(blocks):
                waiting.append(pool.submit(lambda block: [work(int(row)) for row in block], blocks[place + ahead]))
            yield from result


def examine(collection: Collection, options: DataOptions) -> Findings:
    """Look at the images of a collection as thoroughly as it asks for, and drop none yet.

    Raises
    ------
    InputError
        When values lie outside [0, 1] and no value range is given.
    """
    store, count = collection.store, len(collection.store)
    findings = Findings(np.zeros((count, 3), dtype=np.int32), {}, {}, count)
    if collection.check == "decode" and count <= FULL_CHECK:
        _look_at_all(collection, options, findings)
        return findings
    order = seeded_order(0, Stream.SAMPLE, count)
    measure(collection, options, np.sort(order[:SAMPLE]), findings)
    if collection.check == "glance" and count <= GLANCE_CHECK:
        # Not in threads: the work is too small to share.
        for row in np.sort(order[SAMPLE:]):
            try:
                store.glance(int(row))
            except BadImage as problem:
                findings.bad[int(row)] = str(problem)
    else:
        findings.looked = min(count, SAMPLE)
    return findings


def _look_at_all(collection: Collection, options: DataOptions, findings: Findings) -> None:
    """Decode every image, but for those that a look at the same files found good before."""
    count = len(findings.shapes)
    state = collection.state() if collection.state is not None and count >= WORTH_KEEPING else None
    kept = LooksKept(collection.name, (options.channels, options.value_range), state) if state is not None else None
    known = kept.read(count) if kept is not None else None
    if known is not None:
        findings.shapes, findings.moments = known
    rows = np.flatnonzero(findings.shapes[:, 0] == 0)
    logger.info("decoding %d of %d images of %s once, to find broken ones", len(rows), count, collection.name)
    measure(collection, options, rows, findings)
    if kept is not None and known is None:
        kept.write(findings.shapes, findings.moments)


def measure(collection: Collection, options: DataOptions, rows: np.ndarray, findings: Findings) -> None:
    """Decode `rows` and note their shape and moments, or why they are bad.

    Raises
    ------
    InputError
        When values lie outside [0, 1] and no value range is given.
    """
    store = collection.store
    wanted = options.channels

    def look(row: int) -> tuple[tuple[int, int, int], np.ndarray, np.ndarray] | BadImage:
        try:
            image = to_unit(store.read(row), options.value_range)
        except BadImage as problem:
            return problem
        channels, height, width = image.shape
        if wanted is not None and convertible(channels, wanted):
            image = adapt_channels(image, wanted)
        pixels = to_float(image).flatten(1).double()
        return (channels, height, width), pixels.mean(1).numpy(), pixels.square().mean(1).numpy()

    if isinstance(store, ArrayStore):
        rows = _measure_blocks(store, options, rows, findings)
    outside: list[OutOfRange] = []
    for row, found in zip(rows, in_threads(look, rows), strict=True):
        if isinstance(found, OutOfRange):
            outside.append(found)
        elif isinstance(found, BadImage):
            findings.bad[int(row)] = str(found)
        else:
            findings.shapes[row], findings.moments[int(row)] = found[0], (found[1], found[2])
    if outside:
        low, high = min(problem.low for problem in outside), max(problem.high for problem in outside)
        raise out_of_range_error(collection.name, low, high, outside[0].kind)


def _measure_blocks(store: ArrayStore, options: DataOptions, rows: np.ndarray, findings: Findings) -> np.ndarray:
    """Note what can be noted of an array a block at a time; returns the rows of blocks with a bad image in them."""
    left: list[np.ndarray] = []
    for block in np.array_split(rows, range(_BLOCK, len(rows), _BLOCK)):
        try:
            images = to_unit(store.block(block), options.value_range)
        except BadImage:
            left.append(block)
            continue
        shape = images.shape[1:]
        if options.channels is not None and convertible(shape[0], options.channels):
            images = adapt_channels(images, options.channels)
        pixels = to_float(images).flatten(2).double()
        findings.shapes[block] = shape
        moments = zip(pixels.mean(2).numpy(), pixels.square().mean(2).numpy(), strict=True)
        findings.moments.update(zip(block.tolist(), moments, strict=True))
    return np.concatenate(left) if left else rows[:0]


def choose_channels(collection: Collection, options: DataOptions, findings: Findings) -> int:
    """The channels of a source: as asked for, else the commonest; 3 where grey and colour mix.

    Images that cannot be brought to it are noted as bad.

    Raises
    ------
    InputError
        When the images cannot have the channels asked for.
    """
    known = findings.shapes[:, 0] > 0
    values, counts = np.unique(findings.shapes[known, 0], return_counts=True)
    if not len(values):
        return options.channels or 1
    commonest = int(values[counts.argmax()])
    if options.channels is not None:
        if not convertible(commonest, options.channels):
            raise InputError(
                f"{collection.name} holds images of {commonest} channel(s), which cannot become {options.channels}: "
                f"only 1 and 3 are converted into each other. Leave out --channels."
            )
        channels = options.channels
    else:
        channels = 3 if commonest in (1, 3) and {1, 3} <= set(values.tolist()) else commonest
    for row in np.flatnonzero(known):
        if not convertible(int(findings.shapes[row, 0]), channels):
            findings.bad[int(row)] = f"{findings.shapes[row, 0]} channels where the others have {channels}"
    return channels


def refuse_bad(
    collection: Collection, options: DataOptions, findings: Findings, skipped: Sequence[tuple[str, str]]
) -> None:
    """Refuse a collection with more bad images, and files `skipped` when listing, than `options` allow for.

    Raises
    ------
    InputError
        Names some of them.
    """
    bad = [(collection.store.label_of(row), why) for row, why in sorted(findings.bad.items())]
    listed = [*skipped, *bad]
    total = findings.looked + len(skipped)
    if listed and (len(listed) > MOST_BAD * total or options.on_bad_image == "error"):
        raise bad_images_error(collection, listed, total)


def bad_images_error(collection: Collection, bad: Sequence[tuple[str, str]], total: int) -> InputError:
    """The message that refuses a source for its bad images."""
    share = len(bad) / max(total, 1)
    remedy = (
        "or leave it to --on-bad-image skip"
        if share <= MOST_BAD
        else "or point --data at the right files (up to 10 % may be skipped)"
    )
    return InputError(
        f"{len(bad)} of the {total} files or rows of {collection.name} are no usable images: {name_some(bad)}. "
        f"Repair or remove them, {remedy}."
    )


def name_some(bad: Sequence[tuple[str, str]], most: int = 5) -> str:
    """The first few bad files with their reasons."""
    listed = "; ".join(f"{name} ({reason})" for name, reason in bad[:most])
    return listed + (f"; and {len(bad) - most} more" if len(bad) > most else "")
