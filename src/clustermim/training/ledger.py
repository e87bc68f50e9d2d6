"""Figures gathered between two log rows: kept on the device, read in one go, checked for NaN and infinity then.

Reading a loss makes the host wait for the device, so it is not done every step. Still the step at which a loss ceased
to be a number is named exactly, because each step's loss is kept until it is read.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from clustermim.errors import NonFiniteLossError
from clustermim.training.sharding import finite

Record = tuple[int, dict[str, Tensor]]


class Ledger:
    """The figures of the steps since the last log row.

    Parameters
    ----------
    fabric
        Averages the figures over the processes.
    advice
        End of the message when a loss is not finite.
    """

    def __init__(self, fabric: Fabric, advice: str) -> None:
        self._fabric, self._advice = fabric, advice
        self._records: list[Record] = []

    def add(self, step: int, figures: Mapping[str, Tensor]) -> None:
        """Keep scalar `figures` of `step`, `loss` among them; nothing is read yet."""
        self._records.append((step, {name: value.detach() for name, value in figures.items()}))

    def settle(self) -> None:
        """Average what is kept over the processes and check every loss; done before each checkpoint and log row.

        Raises
        ------
        NonFiniteLossError
            Names the first step whose loss is NaN or infinite.
        """
        if not self._records:
            return
        names = sorted(self._records[0][1])
        wide = torch.float64 if self._records[0][1]["loss"].dtype == torch.float64 else torch.float32
        table = torch.stack([torch.stack([figures[name].to(wide) for name in names]) for _, figures in self._records])
        if self._fabric.world_size > 1:
            reduced: Any = self._fabric.all_reduce(table, reduce_op="mean")
            table = reduced
        table = table.cpu()
        self._records = [
            (step, dict(zip(names, row.unbind(), strict=True)))
            for (step, _), row in zip(self._records, table.unbind(), strict=True)
        ]
        for step, figures in self._records:
            if not math.isfinite(figures["loss"].item()):
                raise _by_all(f"The loss of step {step} is {figures['loss'].item()}. {self._advice}")

    def close(self) -> dict[str, float]:
        """The mean of each figure since the last call, after `settle`; the ledger is empty afterwards."""
        self.settle()
        names = sorted(self._records[0][1]) if self._records else []
        means = {
            name: math.fsum(figures[name].item() for _, figures in self._records) / len(self._records) for name in names
        }
        self._records = []
        return means

    def state(self) -> list[Record]:
        """What has been settled but not closed, for a checkpoint."""
        return list(self._records)

    def restore(self, records: Iterable[Record]) -> None:
        """Continue from the `state` of a checkpoint."""
        self._records = list(records)


def check_weights(parameters: Iterable[Tensor], step: int, advice: str) -> None:
    """Refuse weights that an overflowing gradient has spoilt although the loss before it was finite.

    Raises
    ------
    NonFiniteLossError
        A weight is NaN or infinite after `step`.
    """
    if not finite(torch.nn.utils.get_total_norm([p.detach() for p in parameters])):
        raise _by_all(f"The weights are not finite after step {step}: its gradient overflowed. {advice}")


def _by_all(message: str) -> NonFiniteLossError:
    """Every process reads the same averages and holds the same weights, so all of them find it."""
    error = NonFiniteLossError(message)
    error.shared = True
    return error
