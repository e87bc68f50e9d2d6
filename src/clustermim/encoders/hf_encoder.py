"""Hugging Face vision transformers as encoders: ViT, ViTMAE, DINOv2 (with registers too) and BEiT.

`transformers` is imported only when such an encoder is opened. No code from a repository is ever run: weights are read
as safetensors, or as pickles of nothing but tensors.
"""

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clustermim.data.views import ViewConfig
from clustermim.encoders.contract import Encoder, EncoderOutput
from clustermim.encoders.spec_options import parse_size
from clustermim.errors import InputError, nearest

MODELS = {
    "vit": "ViTModel",
    "vit_mae": "ViTMAEModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "beit": "BeitModel",
}
"""`model_type` of a config.json -> class in transformers."""

_MASKED_BEIT = "BeitForMaskedImageModeling"
_TAKES_INTERPOLATE = ("vit", "vit_mae", "beit")


class HFEncoder(Encoder):
    """A vision transformer of `transformers` behind the encoder contract.

    `cls` is the class token, or, of a BEiT that pools by the mean, what its pooler gives at the last layer. `patches`
    are `last_hidden_state` without class token and registers; of inner layers `hidden_states` after the final norm.

    Parameters
    ----------
    model
        An instance of one of the classes in `MODELS`.
    name
        What tables call it.
    image_size
        (height, width) of the images; positions are interpolated where the model was made for others.
    mean, std
        What it was trained with, for images in [0, 1].
    norm
        Final norm where it is not the model's own `layernorm`.

    Raises
    ------
    InputError
        The model gives no features for images of this size.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        *,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        norm: torch.nn.Module | None = None,
    ) -> None:
        config = model.config
        super().__init__(
            name,
            image_size=image_size,
            channels=config.num_channels,
            depth=config.num_hidden_layers,
            mean=mean,
            std=std,
        )
        self.model = model.eval()
        self.norm = norm
        self._prefix = 1 + int(getattr(config, "num_register_tokens", 0) or 0)
        self._interpolate = config.model_type in _TAKES_INTERPOLATE and image_size != _pair(config.image_size)
        self._masks = config.model_type == "vit_mae"
        self._pools = norm is None and config.model_type == "beit" and config.use_mean_pooling
        side = _pair(config.patch_size)
        self._grid = (image_size[0] // side[0], image_size[1] // side[1])
        if image_size[0] % side[0] or image_size[1] % side[1]:
            raise InputError(
                f"{name} cuts images into patches of {side[0]} × {side[1]} pixels, which do not tile {image_size[0]} × "
                f"{image_size[1]}. Ask for another size, as in hf:NAME?size={side[0] * max(1, self._grid[0])}."
            )
        try:
            with torch.no_grad():
                self.encode(torch.zeros(1, self.channels, *image_size), [self.depth - 1])
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError(
                f"{name} gives no features for {image_size[0]} × {image_size[1]} pixels: {_first_line(error)}"
            ) from error

    def encode(self, images: Tensor, which: Sequence[int]) -> list[EncoderOutput]:
        """Features of normalised images at the layers `which`, in one pass."""
        last = self.depth - 1
        options: dict[str, Any] = {"interpolate_pos_encoding": True} if self._interpolate else {}
        if self._masks:
            # With nothing masked and rising noise the patches keep their number and their order.
            count = self._grid[0] * self._grid[1]
            options["noise"] = torch.arange(count, device=images.device, dtype=torch.float32).expand(len(images), -1)
        inner = any(layer != last for layer in which)
        output = self.model(pixel_values=images, output_hidden_states=inner, return_dict=True, **options)
        final = self.norm or self.model.layernorm
        outputs = {}
        for layer in set(which):
            if layer == last:
                tokens = output.last_hidden_state if self.norm is None else self.norm(output.last_hidden_state)
                whole = output.pooler_output if self._pools else tokens[:, 0]
            else:
                tokens = final(output.hidden_states[layer + 1])
                whole = None if self._pools else tokens[:, 0]
            outputs[layer] = EncoderOutput(cls=whole, patches=tokens[:, self._prefix :])
        return [outputs[layer] for layer in which]

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across for images of this size."""
        side = _pair(self.model.config.patch_size)
        return height // side[0], width // side[1]


def open_hf(spec: str, rest: str, options: Mapping[str, str], view: ViewConfig | None) -> HFEncoder:
    """`hf:<folder or owner/name>[?size=..]`: a ViT, ViTMAE, DINOv2 or BEiT model of `transformers`.

    Parameters
    ----------
    spec
        As the user wrote it.
    rest
        A folder with config.json and weights, or a repository of the hub.
    options
        `size`: image side, `HxW`, or `source` for that of the images. Default: what its preprocessor makes, else what
        its config says.
    view
        The size for `size=source`; mean and std for a model that comes without preprocessor_config.json.

    Raises
    ------
    InputError
        `transformers` is not installed, there is no such model, it is of another kind, or its weights do not fit.
    """
    library = import_transformers(spec)
    with quiet(library):
        config = _load(spec, lambda: library.AutoConfig.from_pretrained(rest, trust_remote_code=False))
        kind = getattr(config, "model_type", "")
        if kind not in MODELS:
            raise InputError(f"{spec} is a model of type {kind!r}, which is none of ours.{nearest(kind, MODELS)}")
        model, norm = _load_model(library, spec, rest, config)
        mean, std, size = _preprocessing(library, spec, rest, view)
    asked = parse_size(spec, options.get("size"), view)
    fits = size is not None and all(a % b == 0 for a, b in zip(size, _pair(config.patch_size), strict=True))
    default = size if fits and size is not None else _pair(config.image_size)
    return HFEncoder(model, spec, image_size=asked or default, mean=mean, std=std, norm=norm)


def import_transformers(what: str) -> Any:
    """The library `transformers`.

    Parameters
    ----------
    what
        What needs it, for the error message.

    Raises
    ------
    InputError
        It is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"{what} needs the library transformers ({error}): pip install 'clustermim[transformers]'."
        ) from None


def _load_model(library: Any, spec: str, rest: str, config: Any) -> tuple[Any, torch.nn.Module | None]:
    """The model with every weight set from the file, and its final norm where that stands beside it."""
    kind, extra = config.model_type, {}
    masked = kind == "beit" and _MASKED_BEIT in (config.architectures or [])
    if kind == "vit" or (kind == "beit" and not config.use_mean_pooling):
        extra["add_pooling_layer"] = False
    if kind == "vit_mae":
        config.mask_ratio = 0.0
    made = getattr(library, _MASKED_BEIT if masked else MODELS[kind])
    model, report = _load(
        spec,
        lambda: made.from_pretrained(
            rest,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **extra,
        ),
    )
    for key, given, wanted in sorted(report["mismatched_keys"], key=str):
        raise InputError(
            f"{spec}: its weights are not those of its config.json: {key} is {tuple(given)} in the file and "
            f"{tuple(wanted)} in the model."
        )
    # The mask token and the head that predicts tokens have no part in the features.
    missing = sorted(key for key in report["missing_keys"] if "mask_token" not in key and "lm_head" not in key)
    if missing:
        raise InputError(
            f"{spec}: {len(missing)} weights of a {made.__name__} are not in the file, the first is {missing[0]} "
            f"{tuple(model.state_dict()[missing[0]].shape)}. Is it a checkpoint of another model?"
        )
    return (model.beit, model.layernorm) if masked else (model, None)


def _preprocessing(
    library: Any, spec: str, rest: str, view: ViewConfig | None
) -> tuple[Sequence[float], Sequence[float], tuple[int, int] | None]:
    """Mean, std and image size by preprocessor_config.json; mean and std of the images where there is none."""
    mixin = importlib.import_module("transformers.image_processing_base").ImageProcessingMixin
    try:
        found, _ = mixin.get_image_processor_dict(rest)
    except (OSError, ValueError):
        if view is None:
            raise InputError(
                f"{spec} has no preprocessor_config.json that says its mean and std: pass `view`, for example "
                f"`source.view`, to use those of the images."
            ) from None
        return view.mean, view.std, None
    size = found.get("crop_size") if found.get("do_center_crop") else None
    size = size or found.get("size")
    if isinstance(size, Mapping):
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    sides = None if size is None else _pair(size)
    if not found.get("do_normalize", True):
        return [0.0], [1.0], sides
    # The processor takes mean and std off pixels that it has multiplied by its factor; ours are in [0, 1].
    factor = 255 * float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 255.0
    mean, std = ([float(v) / factor for v in found.get(key, [0.5])] for key in ("image_mean", "image_std"))
    return mean, std, sides


def _load(spec: str, loader: Any) -> Any:
    """Call a loader of transformers, its many kinds of error turned into ours."""
    try:
        return loader()
    except Exception as error:  # the library, the hub client and unpicklers raise whatever comes to hand
        text = str(error)
        if "weights_only" in text or "WeightsUnpickler" in text or type(error).__name__ == "UnpicklingError":
            raise InputError(
                f"{spec}: its weights are a pickle that holds more than tensors, and reading it could run code, so it "
                f"is refused. Where you trust it, load it yourself and save it with save_pretrained."
            ) from error
        raise InputError(
            f"{spec} cannot be had: {_first_line(error)} Give a folder that save_pretrained wrote, or the name of a "
            f"repository while there is a network."
        ) from error


@contextlib.contextmanager
def quiet(library: Any) -> Iterator[None]:
    """Without its progress bars and reports on the heads that a backbone leaves out."""
    level = library.logging.get_verbosity()
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    try:
        yield
    finally:
        library.logging.set_verbosity(level)
        library.logging.enable_progress_bar()


def _pair(side: Any) -> tuple[int, int]:
    return (int(side[0]), int(side[1])) if isinstance(side, list | tuple) else (int(side), int(side))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
