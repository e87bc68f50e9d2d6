"""A masked image model by name, its weights drawn from a seed."""

from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
from torch import nn

from clustermim.encoders.presets import decoder_defaults, model_kwargs, sincos_positions
from clustermim.errors import InputError
from clustermim.mim.contract import MaskedModel
from clustermim.mim.full import FullEncoderModel
from clustermim.mim.model import DecoderKind, MaskedImageModel

EncoderKind = Literal["visible", "full"]


def build_model(
    model: str,
    *,
    image_size: int | tuple[int, int],
    patch_size: int,
    channels: int,
    output_dim: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    encoder: EncoderKind = "visible",
    decoder: DecoderKind = "self",
    decoder_dim: int | None = None,
    decoder_depth: int | None = None,
    decoder_heads: int | None = None,
) -> tuple[MaskedModel, dict[str, Any]]:
    """A masked image model by name, its weights drawn from `seed` alone.

    Parameters
    ----------
    model
        A preset or the name of a plain timm ViT.
    image_size, patch_size, channels
        Of the images and the patches, in pixels.
    output_dim
        Numbers to predict for a patch.
    mean, std
        Per channel.
    seed
        Of the weights; the global generator is neither read nor moved.
    encoder
        ``"visible"``: the encoder sees visible patches only, and a decoder predicts (MAE, ClusterMIM). ``"full"``: the
        encoder sees mask tokens too, and a linear head predicts (BEiT).
    decoder
        Of a visible-patches encoder: ``"self"`` (MAE) or ``"cross"`` (CrossMAE).
    decoder_dim, decoder_depth, decoder_heads
        Where None, those that go with `model`.

    Returns
    -------
    tuple[MaskedModel, dict]
        The model, and ``{"name", "kwargs"}`` from which ``timm.create_model`` alone rebuilds the encoder.

    Raises
    ------
    InputError
        Unknown model, a patch side that does not divide the image, a decoder that cannot be built, or one
        for an encoder that has none.
    """
    name, kwargs = model_kwargs(model, image_size, patch_size, channels)
    if encoder == "full" and (decoder != "self" or (decoder_dim, decoder_depth, decoder_heads) != (None, None, None)):
        raise InputError(
            "--encoder full has no decoder: leave out --decoder, --decoder-dim, --decoder-depth and --decoder-heads, "
            "or use --encoder visible."
        )
    defaults = decoder_defaults(model)
    with torch.random.fork_rng(devices=[]):
        vit = timm.create_model(name, **kwargs, num_classes=0)
        built: MaskedModel
        if encoder == "full":
            built = FullEncoderModel(vit, output_dim, mean=mean, std=std)
        else:
            built = MaskedImageModel(
                vit,
                output_dim,
                decoder_dim=decoder_dim if decoder_dim is not None else defaults["dim"],
                decoder_depth=decoder_depth if decoder_depth is not None else defaults["depth"],
                decoder_heads=decoder_heads if decoder_heads is not None else defaults["heads"],
                mean=mean,
                std=std,
                decoder=decoder,
            )
    initialise(built, seed)
    return built, {"name": name, "kwargs": kwargs}


@torch.no_grad()
def initialise(model: MaskedModel, seed: int) -> None:
    """Draw all weights from `seed`: Xavier-uniform matrices (the patch projection as one matrix too), zero biases.

    Class token, mask token: normal, std 0.02. Positions: fixed sine-cosine. As in MAE.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    class_token, positions = model.class_token_and_positions()
    nn.init.normal_(class_token, std=0.02, generator=generator)
    nn.init.normal_(model.mask_token, std=0.02, generator=generator)
    positions.copy_(sincos_positions(model.grid, model.encoder.embed_dim)[0])
