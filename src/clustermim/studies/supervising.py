"""The processes of a study on this machine: started, watched, told of in a live table, stopped together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live

from clustermim.errors import Interrupted, ResourceError, Stopped
from clustermim.openmp import WAITING
from clustermim.runs import atomic_write
from clustermim.studies.folder import SETTLED, State, StudyFolder
from clustermim.studies.live import progress_table
from clustermim.studies.pieces import Plan
from clustermim.studies.ranks import local_place, without_ranks
from clustermim.studies.states import states_of, why
from clustermim.training.launch import StopRequest

_LOOK = 0.5  # seconds between two looks at the folder
_AGAIN = {"resume": True}
_DEATHS = 2
"""A piece whose process was killed so often, while nobody asked for it, counts as failed."""


@dataclass
class Crew:
    """The processes to start.

    Attributes
    ----------
    jobs
        How many.
    device
        For all of them; on CUDA each is given a GPU of its own as far as they go round.
    gpus
        How many GPUs there are.
    """

    recipe: Path
    folder: StudyFolder
    plan: Plan
    jobs: int
    device: str
    gpus: int = 0
    workers: int | None = None
    max_minutes: float | None = None
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """CPU threads of each process."""
        return max(1, (os.cpu_count() or 1) // self.jobs)

    def start(self, place: int) -> None:
        """Start the process of one place."""
        environment = WAITING | without_ranks() | {"OMP_NUM_THREADS": str(self.threads)}
        if self.gpus > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.gpus)))).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[(place + (local_place() or 0)) % len(visible)]
        words = [sys.executable, "-m", "clustermim.studies.worker", str(self.recipe), str(self.folder.path)]
        words += ["--device", self.device, "--threads", str(self.threads)]
        words += [] if self.workers is None else ["--workers", str(self.workers)]
        words += [] if self.max_minutes is None else ["--max-minutes", str(self.max_minutes)]
        logs = self.folder.path / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{os.uname().nodename}-{os.getpid()}-{place}.txt").open("ab") as log:
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
        self.processes.append(process)
        self.places[process.pid] = place

    def end(self) -> None:
        """Ask every process to stop, and wait: trainings write a checkpoint first."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def last_words(self) -> str:
        """The end of what the processes said."""
        texts = [
            file.read_text(errors="replace") for file in sorted((self.folder.path / "logs").glob(f"*-{os.getpid()}-*"))
        ]
        return " ".join(" ".join(text.split())[-500:] for text in texts if text.strip())


def supervise(crew: Crew, stop: StopRequest, estimate: Mapping[str, float]) -> dict[str, State]:
    """Run the processes until all pieces are settled.

    Parameters
    ----------
    crew
        What to start.
    stop
        Passed on to all of them.
    estimate
        Seconds that each piece is thought to take, for the time that is left.

    Returns
    -------
    dict
        The state of every piece.

    Raises
    ------
    Stopped
        On request, after everything was put by.
    ResourceError
        The disk is full, or the processes cannot run.
    """
    console = Console(stderr=True)
    folder, plan = crew.folder, crew.plan
    told: set[str] = {i for i, s in states_of(plan, folder).items() if s in SETTLED}
    with ExitStack() as stack:
        stack.callback(crew.end)
        for place in range(crew.jobs):
            crew.start(place)
        live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        if live is not None:
            stack.enter_context(live)
        while True:
            states = states_of(plan, folder)
            if live is not None:
                live.update(progress_table(folder, plan, states, estimate, crew.jobs))
            else:
                told |= _tell(console, folder, plan, states, told)
            if all(state in SETTLED for state in states.values()):
                return states
            if stop.reason is not None:
                crew.end()
                if stop.interrupted:
                    raise Interrupted
                raise Stopped(
                    f"The study was stopped {stop.reason}. The same command with --resume continues.", again=_AGAIN
                )
            _look_after(crew)
            time.sleep(_LOOK)


def _tell(console: Console, folder: StudyFolder, plan: Plan, states: Mapping[str, State], told: set[str]) -> set[str]:
    """Where there is no terminal, a line for each piece that has been settled."""
    new = {identity for identity, state in states.items() if state in SETTLED} - told
    for number, identity in enumerate((i for i in plan.pieces if i in new), len(told) + 1):
        piece = plan.pieces[identity]
        line = f"[{number}/{len(plan.pieces)}] {states[identity]}: {piece.kind} of {piece.name}"
        if states[identity] != "done":
            line += f": {why(plan, folder, states, identity)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return new


def _look_after(crew: Crew) -> None:
    """Start a process anew that was killed; a piece that kills its process again and again has failed."""
    for process in list(crew.processes):
        code = process.poll()
        if code is None:
            continue
        crew.processes.remove(process)
        if process.stdin is not None:
            process.stdin.close()
        if code == 0:
            continue  # it saw everything settled
        if code == 75:
            why = "One of its processes was stopped" if crew.max_minutes is None else "It was stopped at --max-minutes"
            raise Stopped(f"{why}; the same command with --resume continues.", again=_AGAIN)
        if code == 130:
            raise Interrupted
        if code > 0:
            raise ResourceError(f"A process of the study ended with {code}: {crew.last_words()}", again=_AGAIN)
        _bury(crew, process.pid, -code)
        crew.start(crew.places[process.pid])


def _bury(crew: Crew, pid: int, number: int) -> None:
    """Note what a killed process was doing."""
    folder = crew.folder
    rows = folder.journal()
    mine = [row for row in rows if row["pid"] == pid and row["host"] == os.uname().nodename]
    if not mine or mine[-1]["event"] != "begin":
        return
    identity = mine[-1]["piece"]
    folder.note("died", identity)
    deaths = 1 + sum(row["event"] == "died" and row["piece"] == identity for row in rows)
    if deaths >= _DEATHS:
        why = "; most often memory gave out, and fewer --jobs help" if number == signal.SIGKILL else ""
        folder.fail(
            identity, ResourceError(f"its process was killed {deaths} times ({signal.Signals(number).name}{why})")
        )


def write_recipe(folder: StudyFolder, text: str, digest: str) -> Path:
    """The recipe of this call, for its processes; another call may have another."""
    file = folder.path / "recipes" / f"{digest}.yaml"
    if not file.exists():
        atomic_write(file, text)
    return file
