"""Where rows of metrics go beside metrics.jsonl: to TensorBoard and to Weights & Biases, and never in a training's way.

A resumed run repeats the steps since its last checkpoint; each logger sees to it that its curves do not.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, Protocol, get_args
from uuid import uuid4

import numpy as np
from jaxtyping import UInt8

from clustermim.errors import InputError, nearest
from clustermim.runs import RunDirectory

LogTo = Literal["tensorboard", "wandb"]

_UPLOAD_SECONDS = 30.0
"""What the end of a run waits for an upload; the files that were not sent lie in the run directory."""


class MetricsLogger(Protocol):
    """One place to log to, in the first process only. Whatever it raises, training goes on without it."""

    def row(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step; steps never fall."""

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Take a picture of a step."""

    def close(self, exit_code: int) -> None:
        """Bring all of it to where it is kept."""


class TensorBoardLogger:
    """Event files in OUT/tensorboard, a further one for each continuation.

    PyTorch's writer is used as it is: Fabric's logger around it has no pictures, and expands `$` in paths.

    Parameters
    ----------
    run
        Held.
    step
        The last step done; what earlier event files hold beyond it is withdrawn.
    seen
        The last step of which a row was written before; of no use here.
    """

    def __init__(self, run: RunDirectory, step: int, seen: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = step + 1 if run.resuming else None
        self._writer: Any = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge)

    def row(self, step: int, figures: Mapping[str, float]) -> None:
        """See `MetricsLogger.row`. Flushed, so that whatever a checkpoint counts on has left the process before it."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """See `MetricsLogger.picture`."""
        self._writer.add_image(name, picture, step, dataformats="HWC")
        self._writer.flush()

    def close(self, exit_code: int) -> None:
        """See `MetricsLogger.close`."""
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases whose id stands in the manifest, so that a continuation goes on with it.

    Project, entity and mode are W&B's own business (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE); the project is
    `clustermim` where none is named.

    Parameters
    ----------
    run
        Held.
    step
        The last step done; of no use here.
    seen
        The last step of which a row was written before. W&B can take nothing back, and steps that are repeated are the
        same, so up to here nothing is sent again.
    """

    def __init__(self, run: RunDirectory, step: int, seen: int) -> None:
        import wandb

        self._image = wandb.Image
        known = run.manifest.get("wandb_id")
        self._seen = -1 if known is None else seen
        if known is None:
            known = uuid4().hex[:12]
            run.write_manifest({"wandb_id": known})
        self._run = wandb.init(
            id=known,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "clustermim"),
            name=run.path.resolve().name,
            dir=str(run.path),
            config=run.config,
            reinit="create_new",
            # The bar on stderr is not for W&B, whose copy of it would also garble it.
            settings=wandb.Settings(console="off", finish_timeout=_UPLOAD_SECONDS),
        )

    def row(self, step: int, figures: Mapping[str, float]) -> None:
        """See `MetricsLogger.row`."""
        if step > self._seen:
            self._run.log(dict(figures), step=step)

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """See `MetricsLogger.picture`."""
        if step > self._seen:
            self._run.log({name: self._image(picture)}, step=step)

    def close(self, exit_code: int) -> None:
        """See `MetricsLogger.close`."""
        self._run.finish(exit_code=exit_code)


LOGGERS: dict[str, Callable[[RunDirectory, int, int], MetricsLogger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}
"""A new one is a class, a line here, a name in `LogTo`, and an extra of the same name."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse unknown loggers, and those whose package is not installed.

    Raises
    ------
    InputError
        Names the nearest, or the command that installs the package.
    """
    for name in names:
        if name not in get_args(LogTo):
            raise InputError(f"There is no --log {name!r}.{nearest(name, get_args(LogTo))}")
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as W&B leaves behind, is no package
            raise InputError(
                f"--log {name} needs the package {name}, which is not installed: pip install 'clustermim[{name}]', or "
                "leave it out (metrics.jsonl is always written)."
            )


class Loggers:
    """Several loggers as one. What fails is told once and left out from then on; nothing is ever raised.

    Parameters
    ----------
    names
        Of `LOGGERS`.
    warn
        Told in words.
    """

    def __init__(self, names: Sequence[str], warn: Callable[[str], None] = lambda message: None) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.warn = warn
        self._open: dict[str, MetricsLogger] = {}

    def open(self, run: RunDirectory, step: int, seen: int = -1) -> None:
        """Begin, or go on after `step`, where rows up to step `seen` were logged before."""
        for name in self.names:
            try:
                self._open[name] = LOGGERS[name](run, step, seen)
            except Exception as error:
                self._tell(name, error)

    def row(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics under its `step`."""
        figures = {key: value for key, value in row.items() if key != "step"}
        self._each(lambda logger: logger.row(row["step"], figures))

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Log a picture."""
        self._each(lambda logger: logger.picture(step, name, picture))

    def close(self, exit_code: int = 0) -> None:
        """End all of them."""
        self._each(lambda logger: logger.close(exit_code))
        self._open = {}

    def _each(self, call: Callable[[MetricsLogger], None]) -> None:
        for name, logger in list(self._open.items()):
            try:
                call(logger)
            except Exception as error:
                del self._open[name]
                self._tell(name, error)

    def _tell(self, name: str, error: Exception) -> None:
        """Libraries of others raise whatever they like: all of it is told, none of it ends a training."""
        reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
        self.warn(
            f"Warning: --log {name} failed ({reason}). Training goes on without it; metrics.jsonl is complete, and "
            "--resume tries it again."
        )
