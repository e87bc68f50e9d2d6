"""The spelling of features: `name[:argument][@file][?key=value&..]`, parts joined by `+`, a tail behind `|`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from clustermim.errors import InputError, nearest


@dataclass(frozen=True)
class SpecPart:
    """One part of a spec, taken apart: `backbone:resnet18@w.pth?layer=2` has argument ``resnet18``."""

    text: str
    name: str
    argument: str | None
    file: str | None
    options: Mapping[str, str]
    base: Path | None = None
    """Folder that relative paths start from; None: the working directory."""

    def path(self, named: str) -> Path:
        """Where a file or folder is that the spec names."""
        return Path(named) if self.base is None else Path(os.path.normpath(self.base / named))

    def check_options(self, known: Sequence[str]) -> None:
        """Refuse options that the feature does not have.

        Raises
        ------
        InputError
            Names the unknown option and the nearest known one.
        """
        for key in self.options:
            if key not in known:
                raise InputError(f"Features `{self.text}`: there is no option {key!r}.{nearest(key, known)}")

    def check_bare(self) -> None:
        """Refuse a name behind `:` and a file behind `@`, for features that take neither.

        Raises
        ------
        InputError
            There is one.
        """
        if self.argument is not None or self.file is not None:
            raise InputError(
                f"Features `{self.text}`: {self.name} takes no name and no file; write {self.name}?key=value."
            )

    def integer(self, key: str) -> int | None:
        """A whole number, or None where the option is not given. Raises InputError for anything else."""
        if key not in self.options:
            return None
        try:
            return int(self.options[key])
        except ValueError:
            raise InputError(
                f"Features `{self.text}`: {key} must be a whole number, not {self.options[key]!r}."
            ) from None

    def number(self, key: str, default: float) -> float:
        """A number of at least 0. Raises InputError for anything else."""
        try:
            value = float(self.options.get(key, default))
        except ValueError:
            value = -1.0
        if not 0.0 <= value < float("inf"):
            raise InputError(
                f"Features `{self.text}`: {key} must be a number of at least 0, not {self.options[key]!r}."
            )
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false. Raises InputError for anything else."""
        value = self.options.get(key, str(default)).lower()
        if value not in ("true", "false", "1", "0", "yes", "no"):
            raise InputError(f"Features `{self.text}`: {key} is true or false, not {self.options[key]!r}.")
        return value in ("true", "1", "yes")

    def choice(self, key: str, known: Sequence[str]) -> str:
        """One of the known words, the first where the option is not given. Raises InputError for anything else."""
        value = self.options.get(key, known[0])
        if value not in known:
            raise InputError(
                f"Features `{self.text}`: {key} is one of {', '.join(known)}, not {value!r}.{nearest(value, known)}"
            )
        return value


def parse_spec(spec: str, base: Path | None = None) -> tuple[list[SpecPart], SpecPart | None]:
    """Take a spec `part[+part..][|tail]`, each part `name[:argument][@file][?key=value&..]`, apart.

    In the path of a file or folder, `+`, `?`, `@`, `|` and `%` are written %2B, %3F, %40, %7C and %25.

    Parameters
    ----------
    spec
        For example ``"pixel+backbone:resnet18@w.pth?layer=2|pca=64"``.
    base
        Folder that relative paths in it start from; None: the working directory.

    Returns
    -------
    list of SpecPart
        The parts, from left to right.
    SpecPart or None
        What is done with all of them together, its options only; None where nothing is.

    Raises
    ------
    InputError
        Options that are not `key=value`, or more than one tail.
    """
    body, bar, tail = spec.partition("|")
    if "|" in tail:
        raise InputError(f"Features `{spec}`: there is one `|` at most, at the end; its options are joined by &.")
    after = None
    if bar:
        after = SpecPart(spec.strip(), "|", None, None, _options(spec, tail.strip(), "|key=value&key=value"))
        if not after.options:
            raise InputError(f"Features `{spec}`: behind `|` stands what is done with them, for example |pca=64.")
    parts = []
    for text in body.split("+"):
        head, mark, query = text.strip().partition("?")
        head, _, file = head.partition("@")
        name, _, argument = head.partition(":")
        options = _options(text, query, "?key=value&key=value") if mark else {}
        parts.append(SpecPart(text.strip(), name, unquote(argument) or None, unquote(file) or None, options, base))
    return parts, after


def _options(text: str, query: str, form: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise InputError(f"Features `{text}`: options are written {form}, not {form[0]}{query}.") from None
    return dict(pairs)
