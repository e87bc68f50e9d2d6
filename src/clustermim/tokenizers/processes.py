"""Several processes cluster one data set together: each sees its own rows, and sums are sums over all of them."""

from typing import Any

import torch
from torch import Tensor, distributed


class Processes:
    """The processes of the default group of `torch.distributed`, or this one alone where there is no group.

    Fabric, `torchrun` and SLURM make the group (gloo between CPUs, nccl between CUDA devices). All processes must call
    each method together; alone, a method costs nothing.

    Parameters
    ----------
    alone
        This process by itself, also where there is a group.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.together = not alone and distributed.is_available() and distributed.is_initialized()
        self.size = distributed.get_world_size() if self.together else 1
        self.rank = distributed.get_rank() if self.together else 0

    def add(self, mine: Tensor) -> Tensor:
        """The sum over processes; the same bits everywhere."""
        return self._reduce(mine, distributed.ReduceOp.SUM) if self.size > 1 else mine

    def largest(self, mine: float) -> float:
        """The maximum over processes."""
        if self.size == 1:
            return mine
        return float(self._reduce(torch.tensor([mine], dtype=torch.float64), distributed.ReduceOp.MAX))

    def any(self, mine: bool) -> bool:
        """Whether it holds for any process."""
        return mine if self.size == 1 else self.largest(float(mine)) > 0.0

    def sizes(self, mine: int) -> list[int]:
        """The numbers of all processes, in their order."""
        if self.size == 1:
            return [mine]
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = mine
        return [int(count) for count in self.add(counts)]

    def join(self, mine: Tensor) -> Tensor:
        """The rows of all processes behind each other, in the order of the processes; counts may differ."""
        if self.size == 1:
            return mine
        sizes = self.sizes(len(mine))
        here = self._carried(mine)
        padded = here.new_zeros(max(sizes), *mine.shape[1:])
        padded[: len(mine)] = here
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(mine.device)

    def from_first(self, mine: Tensor) -> Tensor:
        """What the first process has; shapes must agree."""
        if self.size == 1:
            return mine
        here = self._carried(mine).clone()
        distributed.broadcast(here, 0)
        return here.to(mine.device)

    def same_object(self, mine: Any) -> Any:
        """What the first process has, of any kind that can be pickled."""
        if self.size == 1:
            return mine
        held = [mine]
        distributed.broadcast_object_list(held, src=0)
        return held[0]

    def _reduce(self, mine: Tensor, how: distributed.ReduceOp.RedOpType) -> Tensor:
        here = self._carried(mine).clone()
        distributed.all_reduce(here, how)
        return here.to(mine.device)

    def _carried(self, mine: Tensor) -> Tensor:
        """On a device whose tensors the group carries: nccl those of CUDA devices only."""
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        return mine.to(device).contiguous()
