"""Values of the options behind an encoder spec: numbers, and the size of the images."""

from clustermim.data.views import ViewConfig
from clustermim.errors import InputError


def parse_size(spec: str, text: str | None, view: ViewConfig | None) -> tuple[int, int] | None:
    """(height, width) from a side, `HxW`, or `source` for the size of the images; None where nothing is asked for.

    Parameters
    ----------
    spec
        The whole spec, for the error message.
    text
        What stands behind `size=`.
    view
        The images' own view, for `source`.

    Raises
    ------
    InputError
        It is none of these, or `source` without a view.
    """
    if text is None:
        return None
    if text == "source":
        if view is None:
            raise InputError(f"{spec}: size=source takes the size of the images: pass `view`.")
        return view.image_size
    sides = [whole_number(spec, "size", side) for side in text.split("x")]
    if len(sides) > 2:
        raise InputError(f"{spec}: size is a side, HxW or 'source', not {text!r}.")
    return sides[0], sides[-1]


def whole_number(spec: str, key: str, text: str) -> int:
    """The number behind `key=`.

    Raises
    ------
    InputError
        It is no whole number.
    """
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{spec}: {key} must be a whole number, not {text!r}.") from None
