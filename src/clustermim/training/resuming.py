"""What a checkpoint holds, how a run goes on from it, and how a run that was asked to stop ends."""

import contextlib
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from clustermim.errors import InputError, Interrupted, Stopped
from clustermim.runs import RunDirectory
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import StopRequest
from clustermim.training.ledger import Ledger
from clustermim.training.sharding import load_model, load_optimiser, whole


def snapshot(
    model: nn.Module,
    optimiser: Any,
    ledger: Ledger,
    seconds: float,
    row: dict[str, Any],
    mean: ModelEmaV3 | None = None,
) -> dict[str, Any]:
    """All that a continued run needs; order, views and masks are functions of the step, so no generator is saved.

    `mean` is a running mean of weights, where one is kept. Sharded tensors are made whole, so all processes must ask
    together.
    """
    return {
        "model": whole(model.state_dict()),
        "optimiser": whole(optimiser.state_dict()),
        "ledger": ledger.state(),
        "ema": None if mean is None else mean.module.state_dict(),
        "seconds": seconds,
        "row": row,
    }


def keep(checkpoints: Checkpoints, run: RunDirectory, step: int, state: dict[str, Any]) -> None:
    """Write a checkpoint, and before it to the disk the rows of metrics that it counts on.

    Raises
    ------
    ResourceError
        It could not be written, or the run directory is gone or another process's.
    """
    run.settle()
    checkpoints.save(step, state)


def restore(
    checkpoints: Checkpoints,
    model: nn.Module,
    optimiser: Any,
    ledger: Ledger,
    run: RunDirectory | None,
    mean: ModelEmaV3 | None = None,
    fabric: Fabric | None = None,
) -> tuple[int, float, dict[str, Any]]:
    """Load the latest checkpoint; returns the steps done, the seconds spent and the last row of metrics.

    Raises
    ------
    InputError
        The processes of `fabric` found different checkpoints.
    """
    found = checkpoints.load_latest()
    if fabric is not None and fabric.world_size > 1:
        gathered: Any = fabric.all_gather(torch.tensor(found[0] if found else 0, device=fabric.device))
        steps = gathered.tolist()
        if len(set(steps)) > 1:
            raise InputError(
                f"--resume: the processes found different checkpoints (of steps {', '.join(map(str, steps))}). --out "
                "must lie on a file system that all machines share."
            )
    done, seconds, row = 0, 0.0, {}
    if found is not None:
        done, state = found
        load_model(model, state["model"])
        load_optimiser(optimiser, state["optimiser"])
        ledger.restore(state["ledger"])
        if mean is not None:
            mean.module.load_state_dict(state["ema"])
        seconds, row = state["seconds"], state["row"]
    if run is not None and run.resuming:
        run.truncate_metrics(done)
    return done, seconds, row


def unsynchronised(fabric: Fabric, forward: Any, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Between processes gradients are averaged once a step, not for each accumulated part."""
    if wanted and fabric.world_size > 1:
        context: contextlib.AbstractContextManager[Any] = fabric.no_backward_sync(forward)
        return context
    return contextlib.nullcontext()


def raise_stopped(stop: StopRequest, done: int, total: int, what: str) -> None:
    """End a run that was asked to stop: Ctrl-C as Python does, anything else as `Stopped`.

    Parameters
    ----------
    stop
        Who asked.
    done, total
        Steps.
    what
        What was stopped, as the subject of a sentence: "Pretraining".
    """
    if stop.interrupted:
        raise Interrupted
    stopped = Stopped(
        f"{what} was stopped {stop.reason or 'by another process'} after step {done} of {total}; a checkpoint is "
        "in place. Repeat the command with --resume to continue exactly."
    )
    stopped.shared = True
    raise stopped
