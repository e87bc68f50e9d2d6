"""Features of a pretrained timm network: patch tokens of a ViT's layer, or a CNN's feature map on the patch grid."""

from collections.abc import Mapping
from typing import Any

import timm
import torch

from clustermim.data.views import ViewConfig
from clustermim.encoders.building import find_timm, open_timm
from clustermim.encoders.timm_encoder import declared_statistics
from clustermim.errors import InputError
from clustermim.features.network import DTYPES, NetworkFeatures, chosen_layer
from clustermim.features.spelling import SpecPart


class BackboneFeatures(NetworkFeatures):
    """`backbone:<timm name>[@file][?layer=9&size=224&dtype=bf16]`: a map of a timm network.

    The weights come from the hub or from a file.
    """

    @classmethod
    def from_spec(cls, part: SpecPart, *, patch_size: int, view: ViewConfig) -> "BackboneFeatures":
        """Build with weights from the hub or from a file.

        Raises
        ------
        InputError
            An unknown network (the nearest is named), one without feature maps, a layer that it does not have, or
            weights that cannot be fetched, read or fitted.
        """
        part.check_options(["layer", "size", "remap", "dtype"])
        if part.argument is None:
            raise InputError(
                f"Features `{part.text}`: name a timm network, for example backbone:vit_small_patch16_224."
            )
        outline = _outline(part.argument, part.text)
        layer = chosen_layer(part, len(outline.feature_info), part.argument)
        dtype = part.choice("dtype", DTYPES)
        grid = (view.image_size[0] // patch_size, view.image_size[1] // patch_size)
        size = _size(part, outline, view.image_size, grid)
        options = {"size": f"{size[0]}x{size[1]}"} | {k: v for k, v in part.options.items() if k == "remap"}
        rest = part.argument if part.file is None else f"{part.argument}@{part.path(part.file)}"
        try:
            encoder = open_timm(part.text, rest, options, view)
        except InputError as error:
            raise InputError(str(error).replace(f"timm:{part.argument}@", f"backbone:{part.argument}@")) from error
        mean, std = declared_statistics(encoder.model, encoder.channels)
        return cls(
            part.text,
            model=encoder.model,
            model_name=part.argument,
            patch_size=patch_size,
            channels=view.channels,
            size=size,
            layer=layer,
            mean=mean,
            std=std,
            dtype=dtype,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "BackboneFeatures":
        """Build the empty network; needs neither hub nor file."""
        name, size = str(config["model_name"]), (int(config["size"][0]), int(config["size"][1]))
        entry = find_timm(name)
        kwargs: dict[str, Any] = {"num_classes": 0, "in_chans": len(config["mean"])}
        if entry is None or entry.fixed_input_size:
            kwargs["img_size"] = size
        keys = ("patch_size", "channels", "layer", "mean", "std", "dtype")
        model = timm.create_model(name, **kwargs)
        return cls(config["spec"], model=model, model_name=name, size=size, **{key: config[key] for key in keys})

    def config(self) -> dict[str, Any]:
        """Everything but the weights."""
        return {"name": "backbone", **super().config()}


def _outline(name: str, spec: str) -> Any:
    """The network without weights or memory, to ask about its layers."""
    find_timm(name)
    with torch.device("meta"):
        try:
            outline: Any = timm.create_model(name)
        except Exception as error:  # timm and its models raise whatever comes to hand
            raise InputError(f"Features `{spec}`: timm cannot build {name!r}: {error}") from error
    if not hasattr(outline, "forward_intermediates") or not hasattr(outline, "prune_intermediate_layers"):
        raise InputError(
            f"Features `{spec}`: {name} offers no feature maps. Choose a network with timm's forward_intermediates: "
            "any ViT, ResNet, ConvNeXt, EfficientNet, Swin and most others."
        )
    return outline


def _size(part: SpecPart, outline: Any, image_size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """At what size the network sees an image.

    Default: a ViT at the size where its patches are ours; any other network with the short side of its training size,
    the image's aspect kept, in multiples of 32.
    """
    text = part.options.get("size")
    own: Any = getattr(getattr(outline, "patch_embed", None), "patch_size", None)
    is_vit = own is not None and all(int(step["reduction"]) == int(own[0]) for step in outline.feature_info)
    if text is None and is_vit:
        return grid[0] * int(own[0]), grid[1] * int(own[1])
    unit = int(own[0]) if is_vit else 32
    if text is None:
        side = min(outline.pretrained_cfg["input_size"][1:])
    else:
        try:
            sides = [int(value) for value in text.split("x")]
        except ValueError:
            sides = []
        if len(sides) not in (1, 2) or min(sides, default=0) < 1:
            raise InputError(
                f"Features `{part.text}`: size is a number of pixels (the short side) or HxW, not {text!r}."
            )
        if len(sides) == 2:
            return sides[0], sides[1]
        side = sides[0]
    short = min(image_size)
    height, width = (max(unit, round(side * length / short / unit) * unit) for length in image_size)
    return height, width
