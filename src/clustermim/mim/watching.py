"""Whoever watches a training: rows of metrics for files and loggers, and looks at the model every few epochs.

Looks are taken by a twin of the model, so nothing of the one in training is touched: no mode, no kernel, no weight.
What fails here ends no training; only a run directory that is gone, or takes no rows, does.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from lightning_fabric import Fabric
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from clustermim.errors import ClusterMIMError
from clustermim.runs import RunDirectory
from clustermim.training.launch import by_the_first
from clustermim.training.loggers import Loggers
from clustermim.training.progress import TrainingProgress
from clustermim.training.sharding import whole

_MAY_FAIL = (ClusterMIMError, OSError, RuntimeError, MemoryError)
"""What disks, memory, data and devices raise; anything else is a fault of ours, and is not hidden."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A training at one step, all tensors whole."""

    step: int
    epoch: float
    """Passes over the data so far."""
    model: Mapping[str, Tensor]
    """State of the masked model."""
    mean: Mapping[str, Tensor] | None
    """State of the running mean of its encoder, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a look has found."""

    told: str
    """One line for the reader."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """For a row of metrics."""
    news: str = ""
    """A few characters for the bar."""
    picture: UInt8[np.ndarray, "h w 3"] | None = None
    """For the loggers."""


@runtime_checkable
class Look(Protocol):
    """Looks at the model; in the first process only."""

    name: str

    def __call__(self, moment: Moment) -> Sight:
        """May raise what disks, memory and data raise; training goes on all the same."""


class Watchers:
    """All that watches one training; a context manager that ends what it has begun.

    Parameters
    ----------
    fabric
        Launched.
    run
        Held; None on all processes but the first.
    log
        Names of loggers.
    every
        Name of each look -> after how many epochs it is taken, and at the end besides; the same in all processes.
    looks
        Those looks; in the first process only.

    Attributes
    ----------
    figures
        What the looks have found last.
    news
        The same for the bar.
    """

    def __init__(
        self,
        fabric: Fabric,
        run: RunDirectory | None,
        log: Sequence[str] = (),
        every: Mapping[str, int] | None = None,
        looks: Sequence[Look] = (),
    ) -> None:
        self._fabric, self._run = fabric, run
        self._loggers = Loggers(() if run is None else log)
        self._every, self._looks = dict(every or {}), list(looks)
        # Before a resumed run cuts off the rows that it will write again.
        self._seen = -1 if run is None else max((int(row.get("step", 0)) for row in run.metrics()), default=-1)
        self._troubled: set[str] = set()
        self.figures: dict[str, Any] = {}
        self.news = ""

    def __enter__(self) -> "Watchers":
        """Nothing is begun before the training is."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the loggers; they are told whether the training ended well."""
        self._loggers.close(0 if error is None else getattr(error, "exit_code", 1))

    def begin(self, progress: TrainingProgress, done: int, total: int, per_epoch: int, batch_size: int) -> None:
        """Start watching after step `done` of `total`; what is told goes to where progress is shown."""
        self._progress, self._total, self._per_epoch, self._batch_size = progress, total, per_epoch, batch_size
        self._loggers.warn = progress.say
        if self._run is not None:
            self._loggers.open(self._run, done, self._seen)
            for row in self._run.metrics():
                if "loss" not in row:
                    self.figures |= {key: value for key, value in row.items() if key not in ("step", "epoch", "images")}

    def record(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.jsonl, and log it; all processes must ask together.

        Raises
        ------
        ResourceError
            metrics.jsonl cannot be written.
        """
        by_the_first(self._fabric, self._record, row)

    def look(self, done: int, model: nn.Module, mean: ModelEmaV3 | None) -> float:
        """Take the looks that are due after step `done`, if any; all processes must ask together.

        Parameters
        ----------
        done
            Steps.
        model
            In training; its weights are read and perhaps gathered.
        mean
            Running mean of its encoder.

        Returns
        -------
        float
            Seconds that it took, in which nothing was trained.

        Raises
        ------
        ResourceError
            The run directory is gone, or metrics.jsonl cannot be written.
        """
        due = {name for name, every in self._every.items() if done % (every * self._per_epoch) == 0}
        due |= self._every.keys() if done == self._total else set()
        if not due:
            return 0.0
        began = time.monotonic()
        moment = Moment(
            step=done,
            epoch=done / self._per_epoch,
            model=whole(model.state_dict()),
            mean=None if mean is None else mean.module.state_dict(),
        )
        by_the_first(self._fabric, self._look, due, moment)
        return time.monotonic() - began

    def _record(self, row: Mapping[str, Any]) -> None:
        assert self._run is not None  # this is the first process
        self._run.append_metrics(row)
        self._loggers.row(row)

    def _look(self, due: set[str], moment: Moment) -> None:
        assert self._run is not None
        self._run.settle()  # a run directory that is gone is never made again by a picture
        for look in self._looks:
            if look.name not in due:
                continue
            try:
                # Processes that read images draw a seed from the global generator, which nothing here may move.
                with torch.random.fork_rng(devices=[]):
                    sight = look(moment)
            except _MAY_FAIL as error:
                self._trouble(look.name, error)
                continue
            self._progress.say(f"Epoch {moment.epoch:g}: {sight.told}")
            self.news = sight.news or self.news
            if sight.figures:
                self.figures |= sight.figures
                place = {"step": moment.step, "epoch": moment.epoch, "images": moment.step * self._batch_size}
                self._record({**place, **sight.figures})
            if sight.picture is not None:
                self._loggers.picture(moment.step, look.name, sight.picture)

    def _trouble(self, name: str, error: BaseException) -> None:
        """Tell of a look that failed, the first time."""
        if name not in self._troubled:
            self._troubled.add(name)
            reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
            self._progress.say(f"Warning: the {name} failed ({reason}). Training goes on; it is tried again when due.")
