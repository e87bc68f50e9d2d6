"""The model: an encoder that sees visible patches only, and a light decoder that predicts something of the hidden ones.

The asymmetric design is that of He et al. 2021 ("Masked Autoencoders Are Scalable Vision Learners"); what is predicted
(tokens, pixels, features) is the business of `targets.py`. The encoder is a plain timm `VisionTransformer`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from clustermim.encoders.presets import sincos_positions
from clustermim.errors import InputError
from clustermim.mim.contract import MaskedModel
from clustermim.mim.crossing import CrossBlock
from clustermim.mim.last_block import LastBlock

DecoderKind = Literal["self", "cross"]


class MaskedImageModel(MaskedModel):
    """Predicts the hidden patches of an image from its visible ones.

    Parameters
    ----------
    encoder, output_dim, mean, std
        As for `MaskedModel`.
    decoder_dim, decoder_depth, decoder_heads
        Width, blocks and attention heads of the decoder.
    decoder
        ``"self"``: mask tokens and visible patches attend to each other, as in MAE. ``"cross"``: each mask token
        attends to the visible patches only, so that the cost falls with the number of patches asked for (Fu et al.
        2024, "Rethinking Patch Dependence for Masked Autoencoders").

    Raises
    ------
    InputError
        The encoder is of another kind, a width is not divisible as attention and positions need it, or the decoder has
        no block.
    """

    def __init__(
        self,
        encoder: nn.Module,
        output_dim: int,
        *,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        mean: Sequence[float],
        std: Sequence[float],
        decoder: DecoderKind = "self",
    ) -> None:
        super().__init__(encoder, output_dim, mean=mean, std=std)
        if decoder_dim % decoder_heads or decoder_dim % 4:
            raise InputError(
                f"A decoder of width {decoder_dim} with {decoder_heads} heads cannot be built: the width must be "
                "divisible by the heads and by 4."
            )
        if decoder_depth < 1:
            raise InputError(
                f"A decoder of {decoder_depth} blocks predicts nothing: it is in blocks that mask tokens see."
            )
        self.decoder = decoder
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(self.grid, decoder_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList()
        for number in range(1, decoder_depth + 1):
            make = CrossBlock if decoder == "cross" else LastBlock if number == decoder_depth else Block
            self.decoder_blocks.append(make(decoder_dim, decoder_heads, mlp_ratio=4.0, qkv_bias=True))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, output_dim)

    def predict(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int64[Tensor, "b v"],
        hidden: Int64[Tensor, "b hidden"],
        asked: Int64[Tensor, "b asked"],
    ) -> Float[Tensor, "b asked out"]:
        """Predictions at the positions `asked` from the patches `visible`; see `encode` and `decode`."""
        return self.decode(self.encode(images, visible), visible, asked)

    def encode(self, images: Float[Tensor, "b c h w"], visible: Int64[Tensor, "b v"]) -> Float[Tensor, "b tokens d"]:
        """The encoder's last layer after its norm for the class token and the patches `visible`: (B, 1+V, D)."""
        encoder = self.encoder
        class_token, positions = self.class_token_and_positions()
        tokens = self.embed(images, visible) + positions[1:][visible]
        first = (class_token + positions[:1]).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([first.to(tokens.dtype), tokens], dim=1)
        result: Tensor = encoder.norm(self.through(encoder.blocks, encoder.norm_pre(tokens)))
        return result

    def decode(
        self,
        encoded: Float[Tensor, "b tokens d"],
        visible: Int64[Tensor, "b v"],
        asked: Int64[Tensor, "b asked"],
    ) -> Float[Tensor, "b asked out"]:
        """Predictions at the positions `asked` from the encoder's output for the positions `visible`.

        Attention knows positions only by what is added to the tokens, so the mask tokens simply follow the visible ones
        and nothing is shuffled back; the last block, norm and head run on the patches asked for alone.
        """
        positions = self.decoder_pos_embed[0]
        seen = self.decoder_embed(encoded)
        places = F.pad(visible + 1, (1, 0))  # 0 is the class token's
        seen = seen + positions[places]
        tokens = (self.mask_token + positions[1:][asked]).to(seen.dtype)
        if self.decoder == "cross":
            tokens = self.through(self.decoder_blocks, tokens, seen)
        else:
            tokens = self.through(self.decoder_blocks[:-1], torch.cat([seen, tokens], dim=1))
            tokens = self.through(self.decoder_blocks[-1:], tokens, seen.shape[1])
        result: Tensor = self.decoder_pred(self.decoder_norm(tokens))
        return result
