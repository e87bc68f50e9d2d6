"""A transformer block whose tokens look at others than themselves: the decoder of CrossMAE and CAPI."""

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.mlp import Mlp
from torch import Tensor, nn


class CrossBlock(nn.Module):
    """Cross-attention from queries to a context, then an MLP; both behind a norm and added to the queries.

    Queries do not see each other, so each prediction costs the same however many are asked for, and a patch's
    prediction does not depend on which others are predicted beside it.

    Parameters
    ----------
    dim
        Width D of queries and context.
    num_heads
        Attention heads; they divide D.
    mlp_ratio
        Width of the MLP as a multiple of D.
    qkv_bias
        Whether the projections to queries, keys and values have a bias.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm_context = nn.LayerNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio))

    def forward(self, queries: Float[Tensor, "b q d"], context: Float[Tensor, "b c d"]) -> Float[Tensor, "b q d"]:
        """The queries after one look at the context."""
        q = self._heads(self.q(self.norm1(queries)))
        k, v = (self._heads(part) for part in self.kv(self.norm_context(context)).chunk(2, dim=-1))
        looked = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        queries = queries + self.proj(looked)
        result: Tensor = queries + self.mlp(self.norm2(queries))
        return result

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
