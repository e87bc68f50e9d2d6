"""A folder that `transformers.ViTModel.from_pretrained` loads, where a run's encoder is what a ViTModel computes."""

import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from clustermim.encoders.contract import EncoderOutput
from clustermim.encoders.exports.card import model_card
from clustermim.encoders.exports.subject import Subject, check_difference
from clustermim.encoders.hf_encoder import import_transformers, quiet
from clustermim.errors import InputError

_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
# As checkpoints on the hub name them; transformers 5 renames them when it loads.
_INSIDE = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def write_transformers(subject: Subject, folder: Path, shown: Path) -> dict[str, Any]:
    """Write config.json, model.safetensors, preprocessor_config.json and README.md.

    Parameters
    ----------
    subject
        What to export.
    folder
        An empty folder to write into.
    shown
        Where it will stand, for the card and for messages.

    Returns
    -------
    dict
        `max_difference`: between the features of the run and of what transformers loads from the folder.

    Raises
    ------
    InputError
        The encoder is none that a ViTModel can compute (says why), transformers is missing, or gives other features.
    """
    library = import_transformers("--format transformers")
    model = subject.encoder.model
    problem = why_no_vit_model(model)
    if problem is not None:
        raise InputError(
            f"{subject.run} cannot become a ViTModel of transformers: {problem}. --format timm or onnx can take it."
        )
    block: Any = model.blocks[0]
    height, width = subject.image_size
    config = library.ViTConfig(
        hidden_size=int(model.embed_dim),
        num_hidden_layers=len(model.blocks),
        num_attention_heads=int(block.attn.num_heads),
        intermediate_size=int(block.mlp.fc1.out_features),
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=float(model.norm.eps),
        image_size=height if height == width else [height, width],
        patch_size=int(model.patch_embed.patch_size[0]),
        num_channels=subject.encoder.channels,
        qkv_bias=block.attn.qkv.bias is not None,
    )
    config.architectures = ["ViTModel"]
    config.save_pretrained(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in to_transformers(model.state_dict()).items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    library.ViTImageProcessor(
        do_resize=True,
        size={"height": height, "width": width},
        resample=3,
        do_rescale=True,
        do_normalize=True,
        image_mean=subject.mean,
        image_std=subject.std,
    ).save_pretrained(folder)
    usage = (
        "from transformers import AutoImageProcessor, ViTModel\n\n"
        f'model = ViTModel.from_pretrained("{shown.name}", add_pooling_layer=False).eval()\n'
        f'processor = AutoImageProcessor.from_pretrained("{shown.name}")\n'
        "tokens = model(**processor(image, return_tensors='pt')).last_hidden_state  # class token first\n"
    )
    (folder / "README.md").write_text(model_card(subject, library="transformers", usage=usage))

    with quiet(library):
        loaded = library.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (subject.mean, subject.std))

    def forward(images: Tensor) -> EncoderOutput:
        tokens = loaded(pixel_values=(images - mean) / std).last_hidden_state
        return EncoderOutput(cls=tokens[:, 0], patches=tokens[:, 1:])

    difference = subject.difference(forward)
    check_difference(difference, 1e-5, str(shown))
    return {"max_difference": difference}


def why_no_vit_model(model: Any) -> str | None:
    """What keeps a timm model from being a `ViTModel`, as the end of a sentence; None where it is one.

    A ViTModel is: patches by one convolution, one class token, a learned position for every token, pre-norm blocks of
    plain attention and a two-layer perceptron with exact GELU, one epsilon, and a final norm before pooling.
    """
    kind = type(model)
    if kind is not VisionTransformer:
        return f"it is a {kind.__name__}, not a VisionTransformer"
    if model.cls_token is None or model.num_prefix_tokens != 1 or model.no_embed_class:
        return "it has not exactly one class token with a position before its patches"
    if model.pos_embed is None or model.dynamic_img_size:
        return "it has no stored position embeddings"
    if type(model.patch_embed) is not PatchEmbed or not isinstance(model.patch_embed.norm, nn.Identity):
        return "its patches are not embedded by one plain convolution"
    if model.patch_embed.proj.bias is None or not isinstance(model.norm_pre, nn.Identity):
        return "it norms the tokens before the first block"
    if not isinstance(model.norm, nn.LayerNorm):
        return "it norms after pooling (fc_norm) and a ViTModel before it"
    if getattr(model, "attn_pool", None) is not None:
        return "it pools by attention"
    epsilons = {float(model.norm.eps)}
    for block in model.blocks:
        problem = _why_no_layer(block)
        if problem is not None:
            return problem
        epsilons |= {float(block.norm1.eps), float(block.norm2.eps)}
    if len(epsilons) > 1:
        return f"its norms have different epsilons ({', '.join(f'{e:g}' for e in sorted(epsilons))})"
    return None


def _why_no_layer(block: Any) -> str | None:
    kind, parts = type(block), [type(getattr(block, name, None)).__name__ for name in ("attn", "mlp")]
    if kind is not Block or parts != ["Attention", "Mlp"]:
        return f"its blocks are not plain ones but {kind.__name__} with {' and '.join(parts)}"
    if not (isinstance(block.norm1, nn.LayerNorm) and isinstance(block.norm2, nn.LayerNorm)):
        return "its norms are no LayerNorms"
    if not (isinstance(block.ls1, nn.Identity) and isinstance(block.ls2, nn.Identity)):
        return "it scales the output of its layers (LayerScale), which a ViTModel does not"
    plain = [getattr(block.attn, name, nn.Identity()) for name in ("q_norm", "k_norm", "norm")]
    plain.append(getattr(block.mlp, "norm", nn.Identity()))
    if not all(isinstance(part, nn.Identity) for part in plain):
        return "it norms queries and keys, or inside its layers"
    if not isinstance(block.mlp.act, nn.GELU) or block.mlp.act.approximate != "none":
        return f"its activation is {type(block.mlp.act).__name__}, not the exact GELU"
    if block.attn.proj.bias is None or block.mlp.fc1.bias is None or block.mlp.fc2.bias is None:
        return "its projections have no biases"
    if block.attn.qkv.out_features != 3 * block.attn.qkv.in_features:
        return "its attention is not as wide as its tokens"
    return None


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm ViT's weights under the names of a `ViTModel` checkpoint; query, key and value in three."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in _OUTSIDE:
            renamed[_OUTSIDE[key]] = value
            continue
        number, inside, kind = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key).groups()  # type: ignore[union-attr]
        layer = f"encoder.layer.{number}"
        if inside == "attn.qkv":
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{layer}.attention.attention.{name}.{kind}"] = part
        else:
            renamed[f"{layer}.{_INSIDE[inside]}.{kind}"] = value
    return renamed
