"""Building timm encoders from a name: with weights from the hub or a file, or with random ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from clustermim.data.views import ViewConfig
from clustermim.encoders.keymaps import is_decoder_key, to_timm
from clustermim.encoders.presets import (
    PRESETS,
    closest,
    default_patch_size,
    find_preset,
    model_kwargs,
    sincos_positions,
)
from clustermim.encoders.spec_options import parse_size, whole_number
from clustermim.encoders.timm_encoder import TimmEncoder, declared_statistics
from clustermim.encoders.weights import load_exactly, read_weights, shape
from clustermim.errors import InputError, nearest
from clustermim.runs import read_manifest


def open_run(path: Path, view: ViewConfig | None = None) -> TimmEncoder:
    """The encoder of a run directory, built by timm from what its manifest says.

    Parameters
    ----------
    path
        A folder with `manifest.json` and `encoder.safetensors`.
    view
        Not needed: a run knows its image size, channels and statistics.

    Raises
    ------
    InputError
        No run directory, one without an encoder, or weights that do not fit the manifest.
    """
    manifest = read_manifest(path)
    try:
        name, kwargs = manifest["model"]["name"], manifest["model"]["kwargs"]
        facts = manifest["data"]
        size, channels, mean, std = (facts[key] for key in ("image_size", "channels", "mean", "std"))
    except (KeyError, TypeError):
        raise InputError(
            f"{path} holds a run of `{manifest.get('kind', '?')}` without an encoder. Give the --out of a pretraining; "
            f"what a tokenizer alone achieves is judged by bag-of-tokens:{path}."
        ) from None
    file = Path(path) / "encoder.safetensors"
    if not file.is_file():
        raise InputError(
            f"{path} has no encoder.safetensors: its training has not ended (status {manifest.get('status', '?')!r}). "
            f"Continue it with --resume."
        )
    model = _create(name, str(path), num_classes=0, **kwargs)
    load_exactly(model, read_weights(file), str(file), f"the {name} of its manifest.json")
    sides = (size, size) if isinstance(size, int) else (size[0], size[1])
    return TimmEncoder(model, str(path), image_size=sides, channels=channels, mean=mean, std=std)


def open_timm(spec: str, rest: str, options: Mapping[str, str], view: ViewConfig | None) -> TimmEncoder:
    """`timm:<name>[@file][?size=..]`: a timm model with its weights from the hub, or from a file.

    Parameters
    ----------
    spec
        As the user wrote it.
    rest
        `<name>` or `<name>@<file>`.
    options
        `size`: image side, `HxW`, or `source` for that of the images (default: what the model was trained at);
        `remap=true`: the file's tensors fit in order and shape and have other names.
    view
        Channels (others than 1 and 3 need weights adapted) and, for `size=source`, the size.

    Raises
    ------
    InputError
        Unknown model, weights that cannot be had, read, or fitted.
    """
    name, _, file = rest.partition("@")
    config = find_timm(name)
    size = parse_size(spec, options.get("size"), view)
    channels = 3 if view is None or view.channels in (1, 3) else view.channels
    kwargs: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if size is not None and (config is None or config.fixed_input_size):
        kwargs["img_size"] = size
    if file:
        model = _create_from_file(name, Path(file), spec, kwargs, remap=options.get("remap", "false") == "true")
    else:
        model = _create(name, spec, pretrained=True, **kwargs)
    declared = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    mean, std = declared_statistics(model, channels)
    sides = size or (int(declared[1]), int(declared[2]))
    return TimmEncoder(model, spec, image_size=sides, channels=channels, mean=mean, std=std)


def timm_from_file(
    name: str, file: Path, spec: str, *, image_size: tuple[int, int] | None = None
) -> tuple[Any, dict[str, Any]]:
    """A timm model with the weights of a file, and the keyword arguments that rebuild it beside `num_classes=0`.

    Parameters
    ----------
    name
        As timm spells it.
    file
        Weights under timm's names, or in the MAE layout.
    spec
        What the user wrote, for error messages.
    image_size
        (height, width) to which position embeddings are resampled; None for the model's own.

    Raises
    ------
    InputError
        Unknown model, or weights that cannot be read or fitted: the first that does not fit is named with both shapes.
    """
    config = find_timm(name)
    first = None if config is None else f"{config.first_conv}.weight"
    state = read_weights(file)
    kwargs: dict[str, Any] = {"in_chans": int(state[first].shape[1]) if first in state else 3}
    if image_size is not None and (config is None or config.fixed_input_size):
        kwargs["img_size"] = list(image_size)
    return _create_from_file(name, file, spec, {"num_classes": 0, **kwargs}, remap=False), kwargs


def open_random(spec: str, rest: str, options: Mapping[str, str], view: ViewConfig | None) -> TimmEncoder:
    """`random:<model>[?patch_size=..&seed=..]`: the floor of an untrained network, at the images' own size.

    Parameters
    ----------
    spec
        As the user wrote it.
    rest
        A preset or a timm name.
    options
        `patch_size` (for presets, default about an eighth of the short side, from 2 to 16) and `seed` (0).
    view
        Size, channels and statistics of the images.

    Raises
    ------
    InputError
        Unknown model, or no view to take the size from.
    """
    if view is None:
        raise InputError(f"{spec} is made to the measure of the images: pass `view`, for example `source.view`.")
    seed = whole_number(spec, "seed", options.get("seed", "0"))
    patch = whole_number(spec, "patch_size", options["patch_size"]) if "patch_size" in options else None
    preset = find_preset(rest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if preset is not None or patch is not None:
            name, kwargs = model_kwargs(
                rest, view.image_size, patch or default_patch_size(view.image_size), view.channels
            )
            model = _create(name, spec, num_classes=0, **kwargs)
        else:
            config = find_timm(rest, *PRESETS)
            kwargs = {"in_chans": view.channels}
            if config is not None and config.fixed_input_size:
                kwargs["img_size"] = view.image_size
            model = _create(rest, spec, num_classes=0, **kwargs)
    if preset is not None:
        model.pos_embed.data = sincos_positions(model.patch_embed.grid_size, model.embed_dim)
    return TimmEncoder(model, spec, image_size=view.image_size, channels=view.channels, mean=view.mean, std=view.std)


def find_timm(name: str, *also: str) -> Any:
    """Timm's pretrained configuration of a model; None where only the hub knows it.

    Parameters
    ----------
    name
        As timm spells it, with or without a tag; `hf-hub:` and `local-dir:` names are left to timm.
    also
        Further names that the user may have meant.

    Raises
    ------
    InputError
        timm has no model, or no weights, of this name; the nearest is named.
    """
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return None
    if not timm.is_model(name):
        raise InputError(
            f"timm has no model called {name!r}.{closest(name, (*timm.list_models(), *also))} "
            f"timm.list_models() names them all."
        )
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tagged = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise InputError(f"timm has no weights called {name!r}.{nearest(name, tagged)}") from error


def _create(name: str, spec: str, **kwargs: Any) -> Any:
    """timm.create_model, its many kinds of error turned into ours."""
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # timm, its models and the hub client raise whatever comes to hand
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = ""
        if kwargs.get("pretrained"):
            advice = f" Without a network, or for weights of your own, give the file: timm:{name}@FILE."
        raise InputError(f"{spec}: timm cannot build {name!r}: {reason}.{advice}") from error


def _create_from_file(name: str, file: Path, spec: str, kwargs: dict[str, Any], *, remap: bool) -> Any:
    state = read_weights(file)
    if any(is_decoder_key(key) and key != "mask_token" for key in state):
        state = to_timm(state)
    with torch.device("meta"):
        whole = _create(name, spec)
    expected: dict[str, Tensor] = whole.state_dict()
    config = whole.pretrained_cfg
    if remap:
        if file.suffix == ".safetensors":
            raise InputError(f"{spec}: a .safetensors file keeps no order, so remap=true needs a .pth file.")
        state = _rename_in_order(state, expected, file, name)
    heads = config.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    headless = {k: v for k, v in state.items() if k.rpartition(".")[0] not in heads}
    # Saying that the weights had no classifier makes timm load strictly; it adapts the grid and the input channels.
    overlay = {"state_dict": headless, "num_classes": 0, "label_offset": 0}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except Exception as error:
        mismatch = _first_mismatch(headless, {k: v for k, v in expected.items() if k.rpartition(".")[0] not in heads})
        reason = mismatch or str(error).strip().splitlines()[0]
        raise InputError(
            f"{file} does not hold the weights of {name}: {reason}. Name the model they belong to"
            f"{'' if remap or mismatch is None else ', or add ?remap=true where only the names differ'}."
        ) from error


def _rename_in_order(state: dict[str, Tensor], expected: dict[str, Tensor], file: Path, name: str) -> dict[str, Tensor]:
    """The file's tensors under timm's names, matched by order; every shape must fit."""

    def counts(key: str) -> bool:
        return not key.endswith("num_batches_tracked")

    theirs, ours = [k for k in state if counts(k)], [k for k in expected if counts(k)]
    for given, wanted in zip(theirs, ours, strict=False):
        if state[given].shape != expected[wanted].shape:
            raise InputError(
                f"{file} does not hold the weights of {name} in order: its {given} is {shape(state[given])} where the "
                f"model's {wanted} is {shape(expected[wanted])}."
            )
    if len(theirs) != len(ours):
        raise InputError(
            f"{file} holds {len(theirs)} tensors, {name} has {len(ours)}: they cannot be matched in order."
        )
    renamed = {wanted: state[given] for given, wanted in zip(theirs, ours, strict=True)}
    return renamed | {k: torch.zeros((), dtype=torch.long) for k in expected if not counts(k)}


def _first_mismatch(state: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """The first tensor that does not fit; differences of grid, patch side and channels, which timm adapts, are none."""
    for key, wanted in expected.items():
        given = state.get(key)
        if given is None or given.shape == wanted.shape:
            continue
        adapted = key.endswith("pos_embed") and given.shape[-1:] == wanted.shape[-1:]
        adapted |= given.ndim == wanted.ndim == 4 and given.shape[0] == wanted.shape[0] and "embed" in key
        if not adapted:
            return f"its {key} is {shape(given)}, the model's is {shape(wanted)}"
    missing = [k for k in expected if k not in state]
    extra = [k for k in state if k not in expected]
    if missing:
        instead = f" (it holds {extra[0]} {shape(state[extra[0]])} instead)" if extra else ""
        return f"the model's {missing[0]} {shape(expected[missing[0]])} is not in it{instead}"
    return f"the model has no {extra[0]} {shape(state[extra[0]])}" if extra else None
