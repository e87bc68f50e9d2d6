"""Whoever watches a training: rows of metrics for files and loggers. None of them changes or ends it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any

from cyclopts import Parameter
from lightning_fabric import Fabric

from clustermim.runs import RunDirectory
from clustermim.training.launch import by_the_first
from clustermim.training.loggers import Loggers, LogTo, check_loggers
from clustermim.training.progress import TrainingProgress


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """How a training is watched. None of it changes the training, and all of it may change from one `--resume` to the
    next.
    """

    log: Annotated[tuple[LogTo, ...], Parameter(consume_multiple=True, negative="", show_default=False)] = ()
    """Where rows of metrics go beside metrics.jsonl: `tensorboard` (event files in OUT/tensorboard), `wandb` (Weights &
    Biases; `WANDB_PROJECT` and `WANDB_MODE=offline` count), or both. Each is an extra of its own: pip install
    'clustermim[tensorboard]'."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_loggers(self.log)

    def settings(self) -> dict[str, Any]:
        """The options that were set, for a run's `config.yaml`."""
        return {"log": list(self.log) or None}


class Watchers:
    """All that watches one training; a context manager that ends what it has begun.

    Parameters
    ----------
    fabric
        Launched.
    run
        Held; None on all processes but the first.
    options
        What was asked for.
    """

    def __init__(self, fabric: Fabric, run: RunDirectory | None, options: WatchOptions | None = None) -> None:
        self._fabric, self._run = fabric, run
        self._loggers = Loggers(() if options is None or run is None else options.log)
        # Before a resumed run cuts off the rows that it will write again.
        self._seen = -1 if run is None else max((int(row.get("step", 0)) for row in run.metrics()), default=-1)

    def __enter__(self) -> "Watchers":
        """Nothing is begun before the training is."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the loggers; they are told whether the training ended well."""
        self._loggers.close(0 if error is None else getattr(error, "exit_code", 1))

    def begin(self, progress: TrainingProgress, done: int) -> None:
        """Start watching after step `done`; warnings go to where progress is shown."""
        self._loggers.warn = progress.say
        if self._run is not None:
            self._loggers.open(self._run, done, self._seen)

    def record(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.jsonl, and log it; all processes must ask together.

        Raises
        ------
        ResourceError
            metrics.jsonl cannot be written.
        """
        by_the_first(self._fabric, self._record, row)

    def _record(self, row: Mapping[str, Any]) -> None:
        assert self._run is not None  # this is the first process
        self._run.append_metrics(row)
        self._loggers.row(row)
