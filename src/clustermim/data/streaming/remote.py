"""Shards that lie elsewhere: opened by fsspec, which reads https://, hf://, s3:// and more in the middle of a file."""

import json
from collections.abc import Sequence
from typing import Any

from clustermim.data.collection import reason_of
from clustermim.errors import InputError

_LISTS = ("sizes.json", "_info.json")


def is_remote(file: str) -> bool:
    """Whether it is an address rather than a path."""
    return "://" in file


def open_remote(address: str) -> Any:
    """A file elsewhere, to be read and sought in.

    Raises
    ------
    InputError
        When fsspec does not know the protocol, or needs another library for it.
    OSError
        When it cannot be opened.
    """
    import fsspec

    try:
        return fsspec.open(address, "rb").open()
    except (ValueError, ImportError) as problem:  # what fsspec raises for a protocol that is unknown or not installed
        raise InputError(f"{address} cannot be opened: {reason_of(problem)}.") from None


def stated_counts(files: Sequence[str]) -> list[int]:
    """The images of each shard, as a list in the folder of the first says.

    The list is `sizes.json` (`{"train-000.tar": 1000, ...}`, webdataset's) or `_info.json` (of timm's data sets).

    Raises
    ------
    InputError
        When there is no such list, or a shard is not in it.
    """
    folder = files[0].rpartition("/")[0]
    stated: dict[str, int] = {}
    reasons = []
    for name in _LISTS:
        try:
            with open_remote(f"{folder}/{name}") as file:
                stated = _sizes(json.load(file))
            break
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            reasons.append(f"{name}: {reason_of(problem)}")
    else:
        raise InputError(
            f"How many images each shard has must be known beforehand, and {folder} has no list that says so "
            f'({"; ".join(reasons)}). Put a sizes.json beside the shards, such as {{"{files[0].rpartition("/")[2]}": '
            f"1000}}, or copy the shards here, where they are counted."
        )
    missing = [file for file in files if file.rpartition("/")[2] not in stated]
    if missing:
        raise InputError(f"{name} in {folder} says nothing of {missing[0]} ({len(missing)} of {len(files)} shards).")
    return [stated[file.rpartition("/")[2]] for file in files]


def _sizes(content: Any) -> dict[str, int]:
    if "splits" not in content:
        return {str(name): int(number) for name, number in content.items()}
    splits = content["splits"].values()
    pairs = [pair for split in splits for pair in zip(split["filenames"], split["shard_lengths"], strict=True)]
    return {str(name): int(number) for name, number in pairs}
