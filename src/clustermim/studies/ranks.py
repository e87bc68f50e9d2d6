"""torchrun and srun start a program many times and number its copies; here each copy is a helper of its own.

Whoever sees these numbers would take the copies for one data-parallel training. A study shares out pieces instead, so
its processes must not see them.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

_NUMBERS = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    }
)


def local_place(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of this copy on its machine; None where there is only one."""
    found = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID"))
    copies = environment.get("LOCAL_WORLD_SIZE", environment.get("SLURM_NTASKS", "1"))
    return None if found is None or copies == "1" else int(found)


def without_ranks(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a process that stands for itself."""
    return {key: value for key, value in environment.items() if key not in _NUMBERS}


@contextlib.contextmanager
def standing_alone() -> Iterator[None]:
    """Hide the numbers from this process meanwhile."""
    hidden = {key: os.environ.pop(key) for key in _NUMBERS & os.environ.keys()}
    try:
        yield
    finally:
        os.environ.update(hidden)
