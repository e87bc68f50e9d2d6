"""timm's transformer blocks with the same mathematics in fewer passes and less memory, for training on a CPU.

A block is x + attention(norm(x)), then x + mlp(norm(x)). Autograd keeps every step's result for the backward pass; here
each half is one function that keeps what is dear to compute (projections, attention's output) and computes again what
is cheap (norms, GELU, attention weights). Attention in 32 bits is PyTorch's kernel; otherwise it goes over a few images
at a time, so that the weights of all pairs of patches stay in the cache. Products in 32 bits are oneDNN's, which are
faster than aten's on the CPUs looked at.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from clustermim.mim.crossing import CrossBlock
from clustermim.mim.last_block import LastBlock
from clustermim.products import linear

_WEIGHTS = 1 << 21
"""Bytes of attention weights held at a time, of as many images as that is: what stays in a core's cache."""


class LeanBlock(Block):
    """A timm `Block` whose forward is computed as above; parameters, names and results are timm's."""

    def forward(
        self, x: Float[Tensor, "b n d"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "b n d"]:
        """The block's output for tokens x, in the precision of x."""
        if attn_mask is not None or is_causal or not _trained_here(x):
            whole: Tensor = super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
            return whole
        ours: Tensor = _through_halves(self, x)
        return ours


class LeanLastBlock(LastBlock):
    """A `LastBlock` that computes so."""

    def forward(self, x: Float[Tensor, "b n d"], start: int) -> Float[Tensor, "b m d"]:  # type: ignore[override]
        """The block's output for the tokens x[:, start:], in the precision of x."""
        return _last_through_halves(self, x, start) if _trained_here(x) else super().forward(x, start)


class LeanCrossBlock(CrossBlock):
    """A `CrossBlock` that computes so."""

    def forward(self, queries: Float[Tensor, "b q d"], context: Float[Tensor, "b c d"]) -> Float[Tensor, "b q d"]:
        """The queries after one look at the context, in their precision."""
        return _across(self, queries, context) if _trained_here(queries) else super().forward(queries, context)


def _precision(x: Tensor) -> torch.dtype:
    """What products of x are computed in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _trained_here(x: Tensor) -> bool:
    """Whether x is on its way to a gradient on a CPU."""
    return torch.is_grad_enabled() and x.device.type == "cpu"


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled it is a tenth slower
def _through_halves(block: Block, x: Tensor) -> Tensor:
    """What a block makes of tokens x."""
    attention, low = cast(Attention, block.attn), _precision(x)
    x = _AttentionHalf.apply(
        _wide(x, low), block.norm1.weight, block.norm1.bias, attention.qkv.weight, attention.qkv.bias,
        attention.proj.weight, attention.proj.bias, attention.num_heads, block.norm1.eps, low,
    )  # fmt: skip
    return _through_mlp(block, x, low)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _last_through_halves(block: LastBlock, x: Tensor, start: int) -> Tensor:
    """What a block makes of the tokens x[:, start:], which look at all of x: both by one norm and one projection."""
    attention, low, dim = cast(Attention, block.attn), _precision(x), x.shape[-1]
    norm, qkv, x = (block.norm1.weight, block.norm1.bias), attention.qkv, _wide(x, low)
    last = _CrossHalf.apply(
        x[:, start:], x, *norm, *norm, qkv.weight[:dim], qkv.bias[:dim], qkv.weight[dim:], qkv.bias[dim:],
        attention.proj.weight, attention.proj.bias, attention.num_heads, block.norm1.eps, low,
    )  # fmt: skip
    return _through_mlp(block, last, low)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _across(block: CrossBlock, x: Tensor, context: Tensor) -> Tensor:
    """What a block makes of queries x and their context."""
    low = _precision(x)
    x = _CrossHalf.apply(
        _wide(x, low), _wide(context, low), block.norm1.weight, block.norm1.bias, block.norm_context.weight,
        block.norm_context.bias, block.q.weight, block.q.bias, block.kv.weight, block.kv.bias, block.proj.weight,
        block.proj.bias, block.num_heads, block.norm1.eps, low,
    )  # fmt: skip
    return _through_mlp(block, x, low)


def _wide(x: Tensor, low: torch.dtype) -> Tensor:
    """The tokens as norms and sums take them: in 32 bits, or in 64 where all is."""
    return x.to(torch.float32) if low != torch.float64 else x


def _through_mlp(block: Block | CrossBlock, x: Tensor, low: torch.dtype) -> Tensor:
    """The second half, the same in every block."""
    mlp = cast(Mlp, block.mlp)
    found: Tensor = _MlpHalf.apply(
        x, block.norm2.weight, block.norm2.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
        block.norm2.eps, low,
    )  # fmt: skip
    return found


def make_lean(model: nn.Module) -> int:
    """Let each plain timm block and each of our decoders' blocks compute itself as above; says how many there were.

    Blocks with dropout, layer scale, normed queries or another activation stay as they are.
    """
    lean: dict[type, type] = {Block: LeanBlock, LastBlock: LeanLastBlock, CrossBlock: LeanCrossBlock}
    blocks = [module for module in model.modules() if type(module) in lean and _plain(module)]
    for block in blocks:
        block.__class__ = lean[type(block)]
    return len(blocks)


def _plain(block: nn.Module) -> bool:
    """Whether a block is x + attention(norm(x)), x + mlp(norm(x)) and nothing more."""
    if isinstance(block, CrossBlock):
        return block.q.bias is not None
    assert isinstance(block, Block)
    attention, mlp = block.attn, block.mlp
    if type(attention) is not Attention or type(mlp) is not Mlp:
        return False
    norms = (block.norm1, block.norm2)
    empty: list[Any] = [block.ls1, block.ls2, block.drop_path1, block.drop_path2]
    empty += [attention.q_norm, attention.k_norm, attention.norm, mlp.norm]
    drops = (attention.attn_drop, attention.proj_drop, mlp.drop1, mlp.drop2)
    linears = (attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
    return (
        all(type(module) is nn.Identity for module in empty)
        and all(isinstance(norm, nn.LayerNorm) and norm.elementwise_affine for norm in norms)
        and all(type(linear) is nn.Linear and linear.bias is not None for linear in linears)
        and all(getattr(drop, "p", 0.0) == 0.0 for drop in drops)
        and isinstance(mlp.act, nn.GELU)
        and mlp.act.approximate == "none"
        and getattr(attention, "gate", None) is None
    )


class _AttentionHalf(torch.autograd.Function):
    """x + proj(attention(qkv(norm(x))))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, shift: Tensor, qkv: Tensor, qkv_bias: Tensor, proj: Tensor,
        proj_bias: Tensor, heads: int, eps: float, low: torch.dtype,
    ) -> Tensor:  # fmt: skip
        qkv_low, proj_low, dim = qkv.to(low), proj.to(low), x.shape[-1]
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm, shift, eps)
        packed = linear(_rows(normed.to(low)), qkv_low, qkv_bias.to(low)).view(*x.shape[:2], -1)
        mixed, sums = _attend(packed[..., :dim], packed[..., dim:], heads)
        out = linear(_rows(mixed), proj_low, proj_bias.to(low)).view_as(x)
        ctx.save_for_backward(x, norm, shift, mean, rstd, qkv_low, proj_low, packed, mixed, sums)
        ctx.heads, ctx.low = heads, low
        return x + out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, shift, mean, rstd, qkv, proj, packed, mixed, sums = ctx.saved_tensors
        dim, kind = x.shape[-1], norm.dtype
        inner = _rows(grad.to(ctx.low))
        of_proj_bias = inner.sum(0)  # at once, while it is in the cache
        of_mixed = linear(inner, proj.t()).view_as(mixed)
        whole = torch.empty_like(packed)
        parts, into = (packed[..., :dim], packed[..., dim:]), (whole[..., :dim], whole[..., dim:])
        _attend_backward(of_mixed, *parts, mixed, sums, ctx.heads, *into)
        of_packed = _rows(whole)
        of_qkv_bias = of_packed.sum(0)
        normed = _rows(_normed(x, norm, shift, mean, rstd).to(ctx.low))
        of_normed = linear(of_packed, qkv.t()).view_as(x)
        of_x, of_norm, of_shift = _norm_backward(of_normed, x, norm, shift, mean, rstd)
        return (
            of_x.add_(grad), of_norm, of_shift, (of_packed.t() @ normed).to(kind), of_qkv_bias.to(kind),
            (inner.t() @ _rows(mixed)).to(kind), of_proj_bias.to(kind), None, None, None,
        )  # fmt: skip


class _CrossHalf(torch.autograd.Function):
    """x + proj(attention(q(norm(x)), kv(norm(context))))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, context: Tensor, norm: Tensor, shift: Tensor, other_norm: Tensor, other_shift: Tensor,
        q: Tensor, q_bias: Tensor, kv: Tensor, kv_bias: Tensor, proj: Tensor, proj_bias: Tensor,
        heads: int, eps: float, low: torch.dtype,
    ) -> Tensor:  # fmt: skip
        q_low, kv_low, proj_low = q.to(low), kv.to(low), proj.to(low)
        normed, *of_x = torch.native_layer_norm(x, x.shape[-1:], norm, shift, eps)
        seen, *of_context = torch.native_layer_norm(context, x.shape[-1:], other_norm, other_shift, eps)
        queries = linear(_rows(normed.to(low)), q_low, q_bias.to(low)).view_as(x)
        packed = linear(_rows(seen.to(low)), kv_low, kv_bias.to(low)).view(*context.shape[:2], -1)
        mixed, sums = _attend(queries, packed, heads)
        out = linear(_rows(mixed), proj_low, proj_bias.to(low)).view_as(mixed)
        ctx.save_for_backward(
            x, norm, shift, *of_x, context, other_norm, other_shift, *of_context, q_low, kv_low, proj_low, queries,
            packed, mixed, sums,
        )  # fmt: skip
        ctx.heads, ctx.low = heads, low
        return x + out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, q, kv, proj, queries, packed, mixed, sums = ctx.saved_tensors
        norm, other = saved[:5], saved[5:]
        kind = norm[1].dtype
        inner = _rows(grad.to(ctx.low))
        of_mixed = linear(inner, proj.t()).view_as(mixed)
        of_queries, of_packed = torch.empty_like(queries), torch.empty_like(packed)
        _attend_backward(of_mixed, queries, packed, mixed, sums, ctx.heads, of_queries, of_packed)
        found: list[list[Tensor]] = []
        for given, weight, (x, scale, shift, mean, rstd) in ((of_queries, q, norm), (of_packed, kv, other)):
            given = _rows(given)
            of_weight = given.t() @ _rows(_normed(x, scale, shift, mean, rstd).to(ctx.low))
            of_x, of_scale, of_shift = _norm_backward(linear(given, weight.t()).view_as(x), x, scale, shift, mean, rstd)
            found.append([of_x, of_scale, of_shift, of_weight.to(kind), given.sum(0).to(kind)])
        (of_x, *of_norm, of_q, of_q_bias), (of_context, *of_other, of_kv, of_kv_bias) = found
        return (
            of_x.add_(grad), of_context, *of_norm, *of_other, of_q, of_q_bias, of_kv, of_kv_bias,
            (inner.t() @ _rows(mixed)).to(kind), inner.sum(0).to(kind), None, None, None,
        )  # fmt: skip


class _MlpHalf(torch.autograd.Function):
    """x + fc2(gelu(fc1(norm(x))))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, shift: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor,
        fc2_bias: Tensor, eps: float, low: torch.dtype,
    ) -> Tensor:  # fmt: skip
        fc1_low, fc2_low = fc1.to(low), fc2.to(low)
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm, shift, eps)
        wide = linear(normed.to(low).flatten(0, 1), fc1_low, fc1_bias.to(low))
        out = linear(F.gelu(wide), fc2_low, fc2_bias.to(low)).view_as(x)
        ctx.save_for_backward(x, norm, shift, mean, rstd, fc1_low, fc2_low, wide)
        ctx.low = low
        return x + out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, shift, mean, rstd, fc1, fc2, wide = ctx.saved_tensors
        inner = grad.to(ctx.low).flatten(0, 1)
        of_fc2_bias, of_fc2 = inner.sum(0), inner.t() @ F.gelu(wide)
        of_wide = torch.ops.aten.gelu_backward(linear(inner, fc2.t()), wide)
        of_fc1_bias = of_wide.sum(0)
        normed = _normed(x, norm, shift, mean, rstd).to(ctx.low).flatten(0, 1)
        of_fc1 = of_wide.t() @ normed
        of_normed = linear(of_wide, fc1.t()).view_as(x)
        of_x, of_norm, of_shift = _norm_backward(of_normed, x, norm, shift, mean, rstd)
        kind = norm.dtype
        return (
            of_x.add_(grad), of_norm, of_shift, of_fc1.to(kind), of_fc1_bias.to(kind), of_fc2.to(kind),
            of_fc2_bias.to(kind), None, None,
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """(B, N, D) as (B·N, D)."""
    return x.flatten(0, 1)


def _normed(x: Tensor, norm: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The norm's output again, from the statistics that are kept."""
    return torch.addcmul(shift, (x - mean).mul_(rstd), norm)


def _norm_backward(
    grad: Tensor, x: Tensor, norm: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a layer norm for its input, weight and bias."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        grad.to(x.dtype), x, x.shape[-1:], mean, rstd, norm, shift, (True, True, True)
    )
    return found


def _apart(x: Tensor, parts: int, heads: int) -> Tensor:
    """(B, N, parts·H·d) as (parts, B, H, N, d), a view."""
    b, n, width = x.shape
    return x.view(b, n, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4)


def _looking(q: Tensor, kv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as (B, H, N, d), views."""
    (queries,), (keys, values) = _apart(q, 1, heads), _apart(kv, 2, heads)
    return queries, keys, values


def _heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """(B, N, parts·H·d) as (parts, B·H, N, d); of one image a view."""
    return _apart(x, parts, heads).flatten(1, 2)


def _images(kv: Tensor, m: int, heads: int) -> int:
    """How many images, of whose tokens m ask, are attended to at a time."""
    return max(_WEIGHTS // (heads * m * kv.shape[1] * kv.itemsize), 1)


def _by_one_kernel(x: Tensor) -> bool:
    """Whether PyTorch's own attention is the faster: in 32 bits by a half; in bf16 its backward takes twice."""
    return x.dtype == torch.float32 and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def _attend(
    q: Float[Tensor, "b m d"], kv: Float[Tensor, "b n two_d"], heads: int
) -> tuple[Float[Tensor, "b m d"], Tensor | None]:
    """softmax(q kᵀ / √d) v for queries of some tokens, and keys and values of all, one behind the other.

    Where one kernel does it, what its backward pass needs comes along: the logarithms of softmax's sums.
    """
    if _by_one_kernel(q):
        found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_looking(q, kv, heads))
        return found.transpose(1, 2).reshape(q.shape), sums
    _, m, width = q.shape
    size = width // heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    images = _images(kv, m, heads)
    for asking, asked, into in zip(*(torch.split(whole, images) for whole in (q, kv, out)), strict=True):
        (queries,) = _heads(asking, 1, heads)
        k, v = _heads(asked, 2, heads)
        weights = torch.bmm(queries * size**-0.5, k.transpose(1, 2)).softmax(-1)
        _apart(into, 1, heads)[0].copy_(torch.bmm(weights, v).view(-1, heads, m, size))
    return out, None


def _attend_backward(
    grad: Float[Tensor, "b m d"],
    q: Float[Tensor, "b m d"],
    kv: Float[Tensor, "b n two_d"],
    out: Float[Tensor, "b m d"],
    sums: Tensor | None,
    heads: int,
    of_q: Float[Tensor, "b m d"],
    of_kv: Float[Tensor, "b n two_d"],
) -> None:
    """Write the gradients of `_attend` for q and kv into `of_q` and `of_kv`; attention weights are computed again.

    `out` and `sums` are what it gave back.
    """
    m, n = q.shape[1], kv.shape[1]
    size = q.shape[2] // heads
    if sums is not None:
        of_out, looked = (_apart(x, 1, heads)[0] for x in (grad, out))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            of_out, *_looking(q, kv, heads), looked, sums, 0.0, False
        )
        _apart(of_q, 1, heads)[0].copy_(found[0])
        for place, part in zip(_apart(of_kv, 2, heads), found[1:], strict=True):
            place.copy_(part)
        return
    images = _images(kv, m, heads)
    wholes = (q, kv, grad, of_q, of_kv)
    for asking, asked, given, into_q, into_kv in zip(*(torch.split(w, images) for w in wholes), strict=True):
        (queries,), (k, v), (of_out,) = _heads(asking, 1, heads), _heads(asked, 2, heads), _heads(given, 1, heads)
        queries = queries * size**-0.5  # not in place: of one image, these are views
        weights = torch.bmm(queries, k.transpose(1, 2)).softmax(-1)
        of_scores = torch.ops.aten._softmax_backward_data(
            torch.bmm(of_out, v.transpose(1, 2)), weights, -1, weights.dtype
        )
        (of_queries,), (of_k, of_v) = _apart(into_q, 1, heads), _apart(into_kv, 2, heads)
        of_queries.copy_(torch.bmm(of_scores, k).mul_(size**-0.5).view(-1, heads, m, size))
        of_k.copy_(torch.bmm(of_scores.transpose(1, 2), queries).view(-1, heads, n, size))
        of_v.copy_(torch.bmm(weights.transpose(1, 2), of_out).view(-1, heads, n, size))
