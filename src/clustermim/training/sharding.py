"""Fully sharded training: each process holds a part of every weight and of the optimiser's state.

PyTorch's FSDP2 (`fully_shard`; Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel")
through Lightning Fabric's `ModelParallelStrategy`. It runs on CUDA, and over gloo on a CPU, where it is of use for
tests only. Checkpoints hold whole tensors under the usual names, so that a run may go on with or without it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def sharding(processes: int) -> ModelParallelStrategy:
    """The strategy over so many processes: every transformer block is gathered for itself, the rest as one."""

    def shard(model: nn.Module, mesh: Any) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        for module in model.modules():
            if _is_block(module):
                fully_shard(module, mesh=mesh["data_parallel"])
        fully_shard(model, mesh=mesh["data_parallel"])
        return model

    return ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1)


def is_sharded(fabric: Fabric) -> bool:
    """Whether `fabric` trains so."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def set_up(fabric: Fabric, model: nn.Module, make_optimiser: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
    """What computes, and what updates; the optimiser is made when the weights are where they will stay.

    Parameters
    ----------
    fabric
        Launched.
    model
        Perhaps compiled; its weights are sharded in place where `fabric` does so.
    make_optimiser
        Called with the model.
    """
    if not is_sharded(fabric):
        found: tuple[Any, Any] = fabric.setup(model, make_optimiser(model))
        return found
    forward = fabric.setup_module(model)
    return forward, fabric.setup_optimizers(make_optimiser(model))


def whole(tree: Any) -> Any:
    """A state dict with every sharded tensor made whole; all processes must ask together."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    return tree


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a model that may be sharded."""
    here = model.state_dict()
    model.load_state_dict({key: _as(value, here.get(key)) for key, value in state.items()})


def load_optimiser(optimiser: Any, state: Mapping[str, Any]) -> None:
    """Load an optimiser's state, whose tensors are whole, into one whose weights may be sharded."""
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    shared = {
        number: {
            key: _as(value, weights[number]) if isinstance(value, Tensor) and value.ndim else value
            for key, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    optimiser.load_state_dict({**state, "state": shared})


def _as(value: Tensor, like: Any) -> Tensor:
    """A whole tensor, cut up as `like` is."""
    if not isinstance(like, DTensor):
        return value
    here = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(here, like.device_mesh, like.placements)


def _is_block(module: nn.Module) -> bool:
    """A transformer block: attention, or a look at others, and an MLP."""
    names = dict(module.named_children())
    return "mlp" in names and ("attn" in names or "kv" in names)


def finite(norm: Tensor) -> bool:
    """Whether a norm of weights that may be sharded is finite."""
    return bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())
