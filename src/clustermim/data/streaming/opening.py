"""Opening what can be read in order: a stream by its spelling, anything else by the resolver of all verbs."""

from dataclasses import replace
from pathlib import Path

from clustermim.data.options import DEFAULTS, DataOptions
from clustermim.data.resolving import STREAM_PREFIXES, DataLike
from clustermim.data.sources import ImageSource, open_source, require_labels
from clustermim.data.streaming.order import StreamOptions
from clustermim.data.streaming.shards import Shards
from clustermim.data.streaming.source import AnySource, StreamSource
from clustermim.data.streaming.tables import open_tables
from clustermim.data.streaming.tars import open_tars
from clustermim.errors import InputError


def open_images(data: DataLike, options: DataOptions = DEFAULTS, stream: StreamOptions | None = None) -> AnySource:
    """Open images from anywhere, for a verb that reads them in order.

    Parameters
    ----------
    data
        `wds:` and tar files: a pattern (`shards/train-{000..099}.tar`, `*`), a folder, or addresses (https://, hf://)
        beside which a sizes.json says how many images each has; `hf-stream:` and a file or folder of parquet, arrow or
        JSON, or owner/name?config=..&split=.. of the hub; or all that `open_source` takes.
    options
        How images are read and viewed. Of a stream `limit` takes images from the fronts of the shards.
    stream
        How an epoch over a stream is shuffled.

    Returns
    -------
    ImageSource or StreamSource
        The former can be read in any order.

    Raises
    ------
    InputError
        When there is nothing there that can be used, or `stream` is given for what is none.
    """
    if isinstance(data, StreamSource):
        return data
    text = str(data) if isinstance(data, str | Path) else ""
    prefix = next((prefix for prefix in STREAM_PREFIXES if text.startswith(prefix)), None)
    if prefix is None:
        if stream is not None and stream != StreamOptions():
            raise InputError("--lanes and --shuffle-window are for streams (wds:..., hf-stream:...): leave them out.")
        return open_source(data, options)
    _, mark, ending = text.rpartition("#")
    if mark and ending in ("train", "test", "all"):
        raise InputError(f"{text}: no part of a stream is split off. Leave out #{ending}, and name the shards to take.")
    shards: Shards
    if prefix == "wds:":
        shards, split = open_tars(text.removeprefix(prefix)), "train"
    else:
        shards, split = open_tables(text.removeprefix(prefix))
    found = StreamSource(shards, split, options, stream or StreamOptions())
    found.order = replace(found.order, lanes=found.order.lanes_of(found.counts))
    return found


def require_labelled(source: AnySource, what: str) -> None:
    """Refuse a source without labels, and let the batches of a stream bring them.

    Parameters
    ----------
    source
        Images.
    what
        What needs the labels, as the subject of a sentence.

    Raises
    ------
    InputError
        When there are none.
    """
    if isinstance(source, ImageSource):
        require_labels(source, what)
    elif not source.labelled:
        raise InputError(
            f"{what} needs labelled images, but {source.name} brings no labels: a tar file has them in members that "
            f"end in .cls, a table in a column 'label' of whole numbers."
        )
    else:
        source.wants_labels = True
