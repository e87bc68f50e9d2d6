"""The data options that every verb shares, flattened onto its command line. Imports no torch, so help stays fast."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token

from clustermim.errors import InputError


def _whole_numbers(kind: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """The numbers behind an option that takes one or more of them."""
    try:
        return tuple(int(token.value) for token in tokens)
    except ValueError:
        typed = " ".join(token.value for token in tokens)
        raise ValueError(f"a size in pixels is one or two whole numbers, not {typed!r}") from None


NUMBERS = Parameter(consume_multiple=True, negative="")
# Of "one number or several" cyclopts would read one; so the tokens are taken as they come.
SIZES = Parameter(consume_multiple=True, negative="", n_tokens=-1, converter=_whole_numbers)
_PAIR = Parameter(negative="")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How images are read, split and viewed; what is left out takes the source's own default."""

    image_size: Annotated[int | tuple[int, ...] | None, SIZES] = None
    """Size of a view in pixels: one number, or height and width. Default: that of the images if all are equal, else
    224."""

    channels: int | None = None
    """Channels of a view; 1 and 3 are converted into each other. Default: those of the images, 3 where grey and colour
    mix."""

    flip: bool | None = None
    """Whether training views are mirrored at random. Default: yes, but no for digits."""

    crop_scale: Annotated[tuple[float, float] | None, _PAIR] = None
    """Smallest and largest share of the image's area in a training crop. Default: 0.2 1, for digits 0.8 1."""

    mean: Annotated[tuple[float, ...] | None, NUMBERS] = None
    """Mean of each channel, in [0, 1]. Default: measured on up to 2,000 training images."""

    std: Annotated[tuple[float, ...] | None, NUMBERS] = None
    """Standard deviation of each channel. Default: measured with the mean."""

    value_range: Annotated[tuple[float, float] | None, _PAIR] = None
    """The pixel values that become 0 and 1; values beyond are clipped. Default: the full range of 8 or 16 bits, 0 to 1
    for floats."""

    group: str | None = None
    """What must stay whole when images are split (patient, slide, video): a column, an array of the .npz, 'folder' (the
    parent folder), or a regular expression with one group over the file's relative path."""

    test_fraction: float = 0.2
    """Share of the images held out for testing where labelled data bring no test split."""

    split_seed: int = 0
    """Seed of that hold-out and of `limit`."""

    on_bad_image: Literal["skip", "error"] = "skip"
    """What to do with unreadable images: skip them (an error above 10 %), or stop at the first sight of one."""

    limit: int | None = None
    """Use only this many images of each split, drawn at random and stratified by class: for a quick look."""

    def __post_init__(self) -> None:
        """Bring numbers into their one form and refuse what no source could use."""
        if self.image_size is not None:
            sides = (self.image_size,) if isinstance(self.image_size, int) else tuple(self.image_size)
            if len(sides) not in (1, 2) or any(int(side) < 1 for side in sides):
                raise InputError(f"--image-size takes one positive number or height and width, not {_join(sides)}.")
            object.__setattr__(self, "image_size", (int(sides[0]), int(sides[-1])))
        if self.channels is not None and self.channels < 1:
            raise InputError(f"--channels must be at least 1, not {self.channels}.")
        for name in ("crop_scale", "mean", "std", "value_range"):
            values = getattr(self, name)
            if values is None:
                continue
            if not all(math.isfinite(value) for value in values):
                raise InputError(f"--{name.replace('_', '-')} must be finite numbers, not {_join(values)}.")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError(
                f"--crop-scale takes the smallest and the largest share of the area, 0 < smallest <= largest <= 1, "
                f"not {_join(self.crop_scale)}; for example: --crop-scale 0.2 1."
            )
        if self.std is not None and any(value <= 0 for value in self.std):
            raise InputError(f"--std must be above 0 in every channel, not {_join(self.std)}.")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise InputError(
                f"--value-range takes the value that becomes 0 and a larger one that becomes 1, "
                f"not {_join(self.value_range)}."
            )
        if not 0 < self.test_fraction < 1:
            raise InputError(f"--test-fraction must lie between 0 and 1, not {self.test_fraction:g}.")
        if self.on_bad_image not in ("skip", "error"):
            raise InputError(f"--on-bad-image is skip or error, not {self.on_bad_image!r}.")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit must be at least 1, not {self.limit}.")

    @property
    def size(self) -> tuple[int, int] | None:
        """`image_size` as (height, width)."""
        if self.image_size is None:
            return None
        assert not isinstance(self.image_size, int)
        return (self.image_size[0], self.image_size[-1])

    def given(self) -> dict[str, Any]:
        """The options that were set, as they are spelt on the command line: what a run's `config.yaml` keeps."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    def group_pattern(self) -> "re.Pattern[str]":
        """`group` as a regular expression with exactly one group.

        Raises
        ------
        InputError
            When it is no such expression.
        """
        assert self.group is not None
        try:
            pattern = re.compile(self.group)
        except re.error as problem:
            raise InputError(f"--group {self.group!r} is no valid regular expression: {problem}.") from None
        if pattern.groups != 1:
            raise InputError(
                f"--group {self.group!r} must be 'folder' or a regular expression with exactly one group in "
                f"brackets, such as '(patient[0-9]+)'; this one has {pattern.groups}."
            )
        return pattern


DEFAULTS = DataOptions()
"""Every option left to the source."""


def _join(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
