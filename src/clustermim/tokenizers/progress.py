"""What a person sees while patches are clustered or named: a bar on stderr, its length learnt on the first pass."""

from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T", bound=Sized)


class PassProgress:
    """A bar per pass over the data; silent where stderr is no terminal, so that logs stay short.

    Parameters
    ----------
    unit
        What is counted, for example ``"patches"``.
    show
        Off for tests and for all processes but the first.
    """

    def __init__(self, unit: str, *, show: bool = True) -> None:
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if show and console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "PassProgress":
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def track(self, parts: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Pass the parts on, counting their lengths."""
        if self._bar is not None:
            self._bar.reset(self._task, total=total, description=what)
        for part in parts:
            yield part
            if self._bar is not None:
                self._bar.advance(self._task, len(part))
