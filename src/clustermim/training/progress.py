"""What a person sees while training runs: a bar on stderr with loss, images a second and time left."""

import contextlib
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

_QUIET_SECONDS = 30.0


class TrainingProgress:
    """A bar on a terminal; a line every half minute where stderr is a file, so that logs stay short.

    Parameters
    ----------
    total
        Number of steps of the whole training.
    label
        What is being trained.
    start
        Step at which a resumed run begins.
    show
        Off on all processes but the first.
    """

    def __init__(self, total: int, label: str, *, start: int = 0, show: bool = True) -> None:
        self.console = Console(stderr=True)
        self._total, self._label, self._start, self._show = total, label, start, show
        self._began = self._spoke = time.monotonic()
        self._bar: Progress | None = None
        if show and self.console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[news]}"),
                console=self.console,
            )
            self._task = self._bar.add_task(label, total=total, completed=start, news="")

    def __enter__(self) -> "TrainingProgress":
        """Start the clock and the bar."""
        self._began = self._spoke = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            with _nobody_reads():
                self._bar.stop()

    def say(self, message: str) -> None:
        """One line for the reader, above the bar."""
        if self._show:
            with _nobody_reads():
                self.console.print(Text(message))

    def time_left(self, step: int) -> float:
        """Seconds to the end, at the mean pace since this process began."""
        done = step - self._start
        return (time.monotonic() - self._began) / done * (self._total - step) if done > 0 else float("nan")

    def update(self, step: int, *, loss: float, images_per_second: float, extra: str = "") -> None:
        """Show how far it is. `loss` is the mean since the last call; `extra` is any further figure."""
        if not self._show:
            return
        news = f"loss {loss:.4f}{extra} · {images_per_second:,.0f} images/s · {duration(self.time_left(step))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, news=news)
        elif step == self._total or time.monotonic() - self._spoke >= _QUIET_SECONDS:
            self._spoke = time.monotonic()
            with _nobody_reads():
                self.console.print(Text(f"{self._label}: step {step} of {self._total} · {news}"), soft_wrap=True)


def _nobody_reads() -> contextlib.AbstractContextManager[None]:
    """A closed terminal or a log file on a full disk is no reason to stop training."""
    return contextlib.suppress(OSError)


def duration(seconds: float) -> str:
    """A time span for people: `42 s`, `3 min 10 s`, `2 h 05 min`; `?` when unknown."""
    if seconds != seconds:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
