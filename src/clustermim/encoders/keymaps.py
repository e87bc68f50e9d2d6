"""Names of weights: ours, the MAE layout, and timm's, and how to go from one to another.

Ours (`MaskedImageModel`): `encoder.<timm key>` and, beside it, `decoder_embed.*`, `mask_token`, `decoder_pos_embed`,
`decoder_blocks.*`, `decoder_norm.*`, `decoder_pred.*`. The MAE layout is the same without the `encoder.` prefix.
timm's is the encoder alone.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clustermim.errors import InputError

PREFIX = "encoder."
DECODER_ROOTS = (
    "decoder_embed",
    "mask_token",
    "decoder_pos_embed",
    "decoder_blocks",
    "decoder_norm",
    "decoder_pred",
)


def is_decoder_key(key: str) -> bool:
    """Whether `key` belongs to the decoder of a masked image model, in either layout."""
    return key.split(".", 1)[0] in DECODER_ROOTS


def to_mae_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `MaskedImageModel` under the keys of the MAE layout; keys of anything else are dropped."""
    flat = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    return flat | {k: v for k, v in state.items() if is_decoder_key(k)}


def from_mae_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the MAE layout under the keys of a `MaskedImageModel`."""
    return {k if is_decoder_key(k) else PREFIX + k: v for k, v in state.items()}


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder alone under timm's keys, from the weights of a `MaskedImageModel` or from the MAE layout."""
    if any(k.startswith(PREFIX) for k in state):
        state = to_mae_layout(state)
    return {k: v for k, v in state.items() if not is_decoder_key(k)}


def unwrap(checkpoint: Mapping[str, Any], where: str = "the checkpoint") -> dict[str, Tensor]:
    """The weights inside a checkpoint file, whatever they are wrapped in.

    Looks inside `state_dict_ema`, `model_ema`, `state_dict`, `model` (in this order) and strips the `module.` that
    data-parallel training leaves.

    Parameters
    ----------
    checkpoint
        What the file holds.
    where
        Name of the file, for the error message.

    Raises
    ------
    InputError
        There are no tensors in it.
    """
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping):
            checkpoint = inner
            break
    state = {str(k).removeprefix("module."): v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    if not state:
        raise InputError(
            f"{where} holds no weights: expected a mapping of names to tensors, found {list(checkpoint)[:5]}."
        )
    return state
