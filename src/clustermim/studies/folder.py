"""A study's folder: what is done, what failed and why, who is at work on what; shared by any number of processes.

study.yaml, plan.json      the recipe as it was read, and its pieces
pieces/ID/                 a finished piece: result.json, log.txt, and what it made; moved here in one step
work/ID/                   a piece that is not finished
failures/ID.json           why a piece failed
locks/ID.lock              held by the process that is at work on it
journal.jsonl              a line for each begin and end, by whom
"""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from clustermim.errors import ClusterMIMError, InputError, ResourceError
from clustermim.lease import Lease
from clustermim.runs import atomic_write
from clustermim.studies.pieces import Piece, Plan

State = Literal["done", "failed", "given up", "running", "ready", "waiting"]
SETTLED = ("done", "failed", "given up")

_RECIPE = "study.yaml"


class StudyFolder:
    """The folder of a study.

    Parameters
    ----------
    path
        Made by `open`; every path that is handed out is absolute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def check(self, *, resume: bool) -> None:
        """Refuse, without touching anything, a folder that is not ours, or that holds a study without `resume`.

        Raises
        ------
        InputError
            Says what is there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path} is a file. Choose a folder that is empty or not there yet.")
        names = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        names = {name for name in names if not name.startswith(".partial-")}
        if names and _RECIPE not in names:
            raise InputError(
                f"--out {self.path} is not empty and holds no study (found {sorted(names)[0]!r}). Nothing was touched; "
                "choose another folder."
            )
        if names and not resume:
            raise InputError(
                f"--out {self.path} holds a study. Add --resume to continue it, or to help another process with it; "
                "nothing that is finished is repeated. Or choose another folder."
            )

    def open(self, recipe: str, plan: Plan) -> None:
        """Make the folder and write down the recipe and the plan.

        Raises
        ------
        InputError
            It cannot be made.
        """
        try:
            for name in ("pieces", "work", "failures", "locks"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out {self.path} cannot be made: {error.strerror or error}. Choose a folder you can write to."
            ) from None
        atomic_write(self.path / _RECIPE, recipe)
        atomic_write(self.path / "plan.json", json.dumps(plan.to_dict(), indent=1))

    def piece(self, identity: str) -> Path:
        """Where a finished piece is."""
        return self.path / "pieces" / identity

    def work(self, identity: str) -> Path:
        """Where an unfinished piece is."""
        return self.path / "work" / identity

    def result(self, identity: str) -> dict[str, Any]:
        """What a finished piece found.

        Raises
        ------
        InputError
            It is damaged.
        """
        record = self.record(identity)
        found: dict[str, Any] = record["result"]
        return found

    def record(self, identity: str) -> dict[str, Any]:
        """Everything that was noted of a finished piece: result, seconds, host, versions."""
        file = self.piece(identity) / "result.json"
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError) as problem:
            raise InputError(
                f"{file} is damaged ({problem}). Remove its folder, and the piece is done again."
            ) from None
        if not isinstance(record, dict) or "result" not in record:
            raise InputError(f"{file} holds no result. Remove its folder, and the piece is done again.")
        return record

    def failure(self, identity: str) -> dict[str, Any] | None:
        """Why a piece failed, or None."""
        try:
            found = json.loads((self.path / "failures" / f"{identity}.json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def states(self, plan: Plan) -> dict[str, State]:
        """The state of every piece, from one look at the folder."""
        done, failed, held = self._names("pieces", ""), self._names("failures", ".json"), self._names("locks", ".lock")
        states: dict[str, State] = {}
        for identity, piece in plan.pieces.items():
            if identity in done:
                states[identity] = "done"
            elif identity in failed:
                states[identity] = "failed"
            else:
                states[identity] = _derived(piece, states, identity in held)
        return states

    def why(self, plan: Plan, states: Mapping[str, State], identity: str) -> str:
        """Why a piece has no result, in words: its own failure, or that of the piece it was given up for."""
        failure = self.failure(identity)
        if failure is not None:
            return str(failure["reason"])
        piece = plan.pieces[identity]
        for other in (*piece.needs, *piece.any_of):
            if states[other] in ("failed", "given up"):
                return (
                    f"given up, because {plan.pieces[other].kind} of {plan.pieces[other].name} failed: "
                    + (self.why(plan, states, other).rpartition("failed: ")[2])
                )
        return ""

    def _names(self, folder: str, suffix: str) -> set[str]:
        with contextlib.suppress(OSError):
            return {
                name.removesuffix(suffix)
                for name in os.listdir(self.path / folder)  # noqa: PTH208 - a thousand Path objects at each look
                if name.endswith(suffix) and not name.startswith(".")
            }
        return set()

    @contextlib.contextmanager
    def claim(self, identity: str) -> Iterator[Lease | None]:
        """Hold a piece, or get None where another process holds it or has settled it meanwhile."""
        lease = Lease(self.path / "locks" / f"{identity}.lock")
        try:
            lease.acquire()
        except InputError:
            yield None
            return
        try:
            settled = self.piece(identity).exists() or self.failure(identity) is not None
            yield None if settled else lease
        finally:
            lease.release()

    def begin(self, identity: str) -> Path:
        """The folder to work in: as it was left, unless it was begun under another path and speaks of that."""
        work = self.work(identity)
        home = work / "home.txt"
        if work.exists() and (not home.exists() or home.read_text() != str(work)):
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        atomic_write(home, str(work))
        self.note("begin", identity)
        return work

    def finish(self, identity: str, record: Mapping[str, Any], lease: Lease) -> None:
        """Put a piece in its place: the last step, and one step."""
        lease.confirm()
        work = self.work(identity)
        atomic_write(work / "result.json", json.dumps(record, indent=1))
        (work / "home.txt").unlink(missing_ok=True)
        try:
            work.rename(self.piece(identity))
        except OSError as error:
            raise ResourceError(
                f"{self.piece(identity)} could not be put in place: {error.strerror or error}."
            ) from error
        self.note("end", identity)

    def fail(self, identity: str, error: BaseException) -> None:
        """Keep the reason of a failure."""
        code = error.exit_code if isinstance(error, ClusterMIMError) else 1
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ClusterMIMError):
            reason = f"{type(error).__name__}: {reason}"
        record = {"reason": reason, "error": type(error).__name__, "exit_code": code, **_signature()}
        atomic_write(self.path / "failures" / f"{identity}.json", json.dumps(record, indent=1))
        self.note("failed", identity)

    def note(self, event: str, identity: str) -> None:
        """A line of the journal, by one call, so that lines of several processes do not mix."""
        line = json.dumps({"event": event, "piece": identity, **_signature()}) + "\n"
        handle = os.open(self.path / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def journal(self) -> list[dict[str, Any]]:
        """The lines of the journal; a torn one is left out."""
        file = self.path / "journal.jsonl"
        rows = []
        for line in file.read_text().splitlines() if file.exists() else []:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def forget_failures(self, plan: Plan) -> int:
        """Let failed pieces be tried again, and drop what was chosen while they were missing; how many had failed."""
        failed = [identity for identity in plan.pieces if self.failure(identity) is not None]
        stale = set(failed)
        for identity, piece in plan.pieces.items():
            if identity not in stale and stale & {*piece.any_of, *piece.needs}:
                stale.add(identity)
                shutil.rmtree(self.piece(identity), ignore_errors=True)
        for identity in failed:
            shutil.rmtree(self.work(identity), ignore_errors=True)
            (self.path / "failures" / f"{identity}.json").unlink(missing_ok=True)
        return len(failed)


def _derived(piece: Piece, states: Mapping[str, State], held: bool) -> State:
    """The state of a piece that is neither done nor failed; the pieces it waits for stand before it."""
    before = [states[other] for other in piece.waits_for]
    if any(states[other] in ("failed", "given up") for other in piece.needs):
        return "given up"
    if piece.any_of and all(states[other] in ("failed", "given up") for other in piece.any_of):
        return "given up"
    if any(state not in SETTLED for state in before):
        return "waiting"
    return "running" if held else "ready"


def _signature() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
