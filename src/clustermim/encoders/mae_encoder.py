"""`mae:<file>`: the encoder in a checkpoint of MAE, DINO, iBOT, MoCo v3 or BEiT, without importing it first."""

from collections.abc import Mapping
from pathlib import Path

from clustermim.data.views import ViewConfig
from clustermim.encoders.foreign import read_foreign
from clustermim.encoders.spec_options import parse_size, whole_number
from clustermim.encoders.timm_encoder import TimmEncoder


def open_mae(spec: str, rest: str, options: Mapping[str, str], view: ViewConfig | None) -> TimmEncoder:
    """`mae:<file>[?size=..&heads=..]`: see `clustermim.encoders.foreign.read_foreign`.

    Parameters
    ----------
    spec
        As the user wrote it.
    rest
        The file.
    options
        `size`: image side, `HxW`, or `source` for that of the images (default: what the file was trained at); `heads`:
        attention heads of an unusual size.
    view
        The size for `size=source`; mean and std for checkpoints that are neither of colour images nor say theirs.

    Raises
    ------
    InputError
        A file that cannot be used.
    """
    heads = whole_number(spec, "heads", options["heads"]) if "heads" in options else None
    size = parse_size(spec, options.get("size"), view)
    found = read_foreign(Path(rest), image_size=size, heads=heads, fallback=view)
    model = found.build(rest)
    return TimmEncoder(
        model, spec, image_size=found.image_size, channels=found.channels, mean=found.mean, std=found.std
    )
