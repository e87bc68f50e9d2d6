"""The last block of a decoder, computed only for the tokens whose results somebody reads."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor


class LastBlock(Block):
    """A timm `Block` that is asked for its last tokens only.

    All tokens are keys and values, as in any block. But queries, the projection and the MLP run on the tokens asked
    for: in MAE's decoder three quarters of them, since nobody reads what becomes of the visible ones. Parameters, their
    names and the results are those of timm's block.
    """

    def forward(self, x: Float[Tensor, "b n d"], start: int) -> Float[Tensor, "b m d"]:  # type: ignore[override]
        """The block's output for the tokens x[:, start:]."""
        attention, mlp = cast(Attention, self.attn), cast(Mlp, self.mlp)
        qkv = attention.qkv
        batch, _, dim = x.shape
        heads, size = attention.num_heads, attention.head_dim
        normed = self.norm1(x)
        q = F.linear(normed[:, start:], qkv.weight[:dim], qkv.bias[:dim])
        q = q.view(batch, -1, heads, size).transpose(1, 2)
        kv = F.linear(normed, qkv.weight[dim:], qkv.bias[dim:])
        k, v = kv.view(batch, -1, 2, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        if attention.fused_attn:
            looked = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = torch.matmul(q * attention.scale, k.transpose(-2, -1)).softmax(-1)
            looked = torch.matmul(weights, v)
        tokens = x[:, start:] + attention.proj(looked.transpose(1, 2).flatten(2))
        result: Tensor = tokens + mlp(self.norm2(tokens))
        return result
