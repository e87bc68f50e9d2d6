"""What a person sees while encoders are judged: one bar on stderr for a row of jobs."""

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from clustermim.evaluation.cache import Progress


@contextlib.contextmanager
def job_bar(jobs: int, *, show: bool) -> Iterator[Any]:
    """A bar on stderr, if it is a terminal; gives a function from the number of a job to what `evaluate` tells."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not (show and console.is_terminal), transient=True) as bar:
        task = bar.add_task("", total=None)

        def told(number: int) -> Progress:
            def tell(what: str, done: int, total: int) -> None:
                bar.update(task, description=f"[{number + 1}/{jobs}] {what}", completed=done, total=total)

            return tell

        yield told
