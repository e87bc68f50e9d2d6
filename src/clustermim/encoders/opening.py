"""From what a user writes to an encoder: `open_encoder` and the registry of kinds.

A new kind is one function in one file and one line in `OPENERS`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from clustermim.data.views import ViewConfig
from clustermim.encoders.building import open_random, open_run, open_timm
from clustermim.encoders.contract import Encoder
from clustermim.encoders.floors import open_raw_pixels
from clustermim.encoders.hf_encoder import open_hf
from clustermim.encoders.mae_encoder import open_mae
from clustermim.encoders.module_encoder import ModuleEncoder
from clustermim.encoders.timm_encoder import TimmEncoder, declared_statistics
from clustermim.errors import InputError, nearest

Opener = Callable[[str, str, Mapping[str, str], ViewConfig | None], Encoder]
"""(the whole spec, what follows the kind, its options, the view of the images) -> the encoder."""


class Kind:
    """One kind of encoder spec: who opens it, and which options it takes behind a `?`."""

    def __init__(self, opener: Opener, *options: str, bare: bool = False) -> None:
        self.opener = opener
        self.options = options
        self.bare = bare
        """Whether nothing follows the kind, as in `raw-pixels`."""


OPENERS: dict[str, Kind] = {
    "timm": Kind(open_timm, "size", "remap"),
    "hf": Kind(open_hf, "size"),
    "mae": Kind(open_mae, "size", "heads"),
    "random": Kind(open_random, "patch_size", "seed"),
    "raw-pixels": Kind(open_raw_pixels, bare=True),
}


def open_encoder(
    spec: str | Path | nn.Module,
    *,
    view: ViewConfig | None = None,
    kinds: Mapping[str, Kind] = OPENERS,
) -> Encoder:
    """The encoder that `spec` names, in evaluation mode.

    Parameters
    ----------
    spec
        A run directory, `timm:<name>[@file]`, `hf:<folder or repository>`, `mae:<file>`, `random:<model>`,
        `raw-pixels`, or a module: an `Encoder` is returned as it is, a timm model keeps its layers, any other may
        return (B, D), (B, N, D) or (B, D, h, w).
    view
        Size, channels and statistics of the images, for the kinds that are made to their measure.
    kinds
        Registry of the kinds.

    Raises
    ------
    InputError
        Unknown kind, model or option (the nearest is named), a missing path, or weights that cannot be used.
    """
    if isinstance(spec, Encoder):
        return spec.eval()
    if isinstance(spec, nn.Module):
        return _open_module(spec, view).eval()
    text = str(spec)
    if Path(text).is_dir():
        return open_run(Path(text), view).eval()
    head, mark, query = text.partition("?")
    name, colon, rest = head.partition(":")
    kind = kinds.get(name)
    if kind is None:
        forms = [k if found.bare else f"{k}:" for k, found in kinds.items()]
        what = f"no kind of encoder called {name!r}" if colon else f"no run directory at {text!r}"
        raise InputError(f"There is {what}.{nearest(name + colon, forms)} A run directory is given by its path.")
    if bool(rest) == kind.bare:
        problem = "takes nothing behind it" if kind.bare else f"needs a name behind it, as in {name}:NAME"
        raise InputError(f"The encoder {text!r} cannot be opened: {name} {problem}.")
    return kind.opener(text, rest, _parse_options(text, query if mark else "", kind.options), view).eval()


def _parse_options(spec: str, query: str, known: tuple[str, ...]) -> dict[str, str]:
    options = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            raise InputError(f"{spec}: there is no option {part!r}.{nearest(key, known)} Write ?key=value&key=value.")
        options[key] = value
    return options


def _open_module(module: nn.Module, view: ViewConfig | None) -> Encoder:
    name = type(module).__name__
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else view.channels if view is not None else 3
    if not (hasattr(module, "forward_features") and hasattr(module, "forward_head")):
        return ModuleEncoder(module, name, channels=channels)
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    mean, std = declared_statistics(module, channels)
    return TimmEncoder(module, name, image_size=size, channels=channels, mean=mean, std=std)
