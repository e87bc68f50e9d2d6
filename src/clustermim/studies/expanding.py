"""A grid written as lists becomes its members: every combination, each with a name that says what varies."""

import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from clustermim.errors import InputError


@dataclass(frozen=True)
class Member:
    """One member of a grid."""

    family: str
    """Name of the entry that it was written under."""
    name: str
    """The family's, and behind it each value that varies."""
    settings: Mapping[str, Any] = field(hash=False)


def expand(family: str, settings: Mapping[str, Any], *, where: str, single: Collection[str] = ()) -> list[Member]:
    """Every combination of the values that stand as lists.

    Parameters
    ----------
    family
        Name of the entry.
    settings
        Its keys; a list is an axis of the grid, but for the keys in `single`.
    where
        Of the recipe, for messages.
    single
        Keys whose value may be a list and is no axis.

    Raises
    ------
    InputError
        An axis without values, or with one twice.
    """
    axes = {key: value for key, value in settings.items() if isinstance(value, list) and key not in single}
    for key, values in axes.items():
        if not values:
            raise InputError(f"{where}: `{key}` of {family!r} is empty, so nothing would be made. Give it a value.")
        if len({repr(value) for value in values}) < len(values):
            raise InputError(f"{where}: `{key}` of {family!r} holds a value twice.")
    members = []
    for combination in itertools.product(*axes.values()):
        varied = dict(zip(axes, combination, strict=True))
        suffix = "".join(f"-{_label(key)}{_short(value)}" for key, value in varied.items())
        members.append(Member(family, family + suffix, {**settings, **varied}))
    return members


def _label(key: str) -> str:
    return {"mask_ratio": "mask", "patch_size": "p", "image_size": "at", "features": "", "model": ""}.get(key, key)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-")


def slug(name: str) -> str:
    """The name as a folder can be called."""
    return re.sub(r"[^A-Za-z0-9.=+]+", "-", name).strip("-")
