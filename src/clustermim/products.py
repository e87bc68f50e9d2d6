"""Matrix products by the faster library where PyTorch brings two, and what the processor can multiply."""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def linear(x: Float[Tensor, "rows i"], weight: Float[Tensor, "o i"], bias: Tensor | None = None) -> Tensor:
    """The linear layer x weightᵀ + bias without gradients: (rows, o).

    In 32 and 16 bits on a CPU it is oneDNN's, where PyTorch has it: `torch.nn.functional.linear` asks another library
    for 32 bits, which was 5 to 20 % slower on the CPUs looked at.
    """
    able = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and multiplies_bfloat16())
    if torch._C._has_mkldnn and x.device.type == "cpu" and able and len(x):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return F.linear(x, weight, bias)


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by a library made for it.

    Without AVX-512 on x86, or its like elsewhere, PyTorch takes loops that were a hundred and more times slower than
    products in 32 bits.
    """
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
