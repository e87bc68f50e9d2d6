"""Features of an encoder that was pretrained here: tokens of a second and third round, as HuBERT iterates."""

from collections.abc import Mapping
from typing import Any

import timm

from clustermim.data.views import ViewConfig
from clustermim.encoders.building import open_run
from clustermim.errors import InputError
from clustermim.features.network import DTYPES, NetworkFeatures, chosen_layer
from clustermim.features.spelling import SpecPart
from clustermim.runs import read_manifest


class RunFeatures(NetworkFeatures):
    """`run:<run dir>[?layer=6&dtype=bf16]`: patch tokens of the encoder of an earlier `pretrain`.

    Clustered, they give the targets of the next round (Hsu et al., HuBERT, 2021). The encoder is a timm model that the
    run's manifest names; its weights become part of the state dict, so a tokenizer made with it does not need the run
    directory any more. The mean and std are those with which the run was trained.

    Parameters
    ----------
    kwargs
        With which timm builds the model, as the manifest has them.
    """

    def __init__(self, spec: str, *, kwargs: Mapping[str, Any], **rest: Any) -> None:
        super().__init__(spec, **rest)
        self.kwargs = dict(kwargs)

    @classmethod
    def from_spec(cls, part: SpecPart, *, patch_size: int, view: ViewConfig) -> "RunFeatures":
        """Build from a run directory.

        Raises
        ------
        InputError
            No run directory, one without a finished encoder, a layer that it does not have, or an encoder of other
            patches, channels or images than are wanted.
        """
        part.check_options(["layer", "dtype"])
        if part.argument is None or part.file is not None:
            raise InputError(f"Features `{part.text}`: name the run directory of a pretraining, as in run:runs/first.")
        dtype = part.choice("dtype", DTYPES)
        path = part.path(part.argument)
        encoder = open_run(path)
        manifest = read_manifest(path)
        model, data = manifest["model"], manifest["data"]
        own = tuple(int(side) for side in encoder.model.patch_embed.patch_size)
        if own != (patch_size, patch_size):
            raise InputError(
                f"Features `{part.text}`: the encoder has patches of side {own[0]}, wanted are patches of side "
                f"{patch_size}. Use --patch-size {own[0]}."
            )
        if encoder.channels != view.channels:
            raise InputError(
                f"Features `{part.text}`: the encoder takes images of {encoder.channels} channel(s), these have "
                f"{view.channels}. Use --channels {encoder.channels}."
            )
        height, width = encoder.image_size or view.image_size
        if (height, width) != view.image_size:
            raise InputError(
                f"Features `{part.text}`: the encoder was trained on images of {height} × {width} pixels, these views "
                f"have {view.image_size[0]} × {view.image_size[1]}. Use --image-size {height} {width}."
            )
        return cls(
            part.text,
            kwargs=model["kwargs"],
            model=encoder.model,
            model_name=model["name"],
            patch_size=patch_size,
            channels=view.channels,
            size=(height, width),
            layer=chosen_layer(part, len(encoder.model.feature_info), "the encoder"),
            mean=data["mean"],
            std=data["std"],
            dtype=dtype,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "RunFeatures":
        """Build the empty encoder; needs no run directory."""
        keys = ("kwargs", "model_name", "patch_size", "channels", "layer", "mean", "std", "dtype")
        model = timm.create_model(config["model_name"], num_classes=0, **config["kwargs"])
        size = (int(config["size"][0]), int(config["size"][1]))
        return cls(config["spec"], model=model, size=size, **{key: config[key] for key in keys})

    def config(self) -> dict[str, Any]:
        """Everything but the weights."""
        return {"name": "run", "kwargs": self.kwargs, **super().config()}
