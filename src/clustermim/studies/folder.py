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

PRODUCTS: Mapping[str, str] = {"fit": "tokenizer/model.safetensors", "pretrain": "run/encoder.safetensors"}
"""What pieces of a kind make for other pieces to read."""

RECIPE = "study.yaml"


class StudyFolder:
    """The folder of a study.

    Parameters
    ----------
    path
        Made by `open`; every path that is handed out is absolute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._whole: set[str] = set()

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
        if names and RECIPE not in names:
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
        self.make()
        atomic_write(self.path / RECIPE, recipe)
        atomic_write(self.path / "plan.json", json.dumps(plan.to_dict(), indent=1))

    def make(self) -> None:
        """Make the folder.

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

    def finished(self) -> set[str]:
        """Pieces that have a result."""
        return self._names("pieces", "")

    def failed(self) -> set[str]:
        """Pieces that failed."""
        return self._names("failures", ".json")

    def held(self) -> set[str]:
        """Pieces that a process is at work on, or was when it died."""
        return self._names("locks", ".lock")

    def whole(self, piece: Piece) -> bool:
        """Whether a finished piece still has what other pieces read of it, besides its result.

        Results travel without tokenizers and encoders, and these may be deleted to save room. Once found it is not
        looked for again by this object.
        """
        if piece.id not in self._whole and (file := PRODUCTS.get(piece.kind)) is not None:
            if not (self.piece(piece.id) / file).exists():
                return False
            self._whole.add(piece.id)
        return True

    def _names(self, folder: str, suffix: str) -> set[str]:
        with contextlib.suppress(OSError):
            return {
                name.removesuffix(suffix)
                for name in os.listdir(self.path / folder)  # noqa: PTH208 - a thousand Path objects at each look
                if name.endswith(suffix) and not name.startswith(".")
            }
        return set()

    @contextlib.contextmanager
    def claim(self, piece: Piece) -> Iterator[Lease | None]:
        """Hold a piece, or get None where another process holds it or has settled it meanwhile."""
        lease = Lease(self.path / "locks" / f"{piece.id}.lock")
        try:
            lease.acquire()
        except InputError:
            yield None
            return
        try:
            finished = self.piece(piece.id).exists() and self.whole(piece)
            settled = finished or self.failure(piece.id) is not None
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
        """Put a piece in its place: the last step, and one step, but where a piece without product stands there."""
        lease.confirm()
        work = self.work(identity)
        atomic_write(work / "result.json", json.dumps(record, indent=1))
        (work / "home.txt").unlink(missing_ok=True)
        self.put(work, identity)
        self.note("end", identity)

    def put(self, made: Path, identity: str) -> None:
        """Move a folder with a finished piece to its place, instead of what stands there.

        Raises
        ------
        ResourceError
            The system does not let it.
        """
        place, aside = self.piece(identity), self.path / "work" / f".old-{identity}"
        try:
            if place.exists():
                shutil.rmtree(aside, ignore_errors=True)
                place.rename(aside)
            made.rename(place)
        except OSError as error:
            raise ResourceError(f"{place} could not be put in place: {error.strerror or error}.") from error
        shutil.rmtree(aside, ignore_errors=True)

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
        stale = {
            identity for identity in failed if not self.piece(identity).exists()
        }  # others have a result to choose by
        for identity, piece in plan.pieces.items():
            if identity not in stale and stale & {*piece.any_of, *piece.needs}:
                stale.add(identity)
                shutil.rmtree(self.piece(identity), ignore_errors=True)
        for identity in failed:
            shutil.rmtree(self.work(identity), ignore_errors=True)
            (self.path / "failures" / f"{identity}.json").unlink(missing_ok=True)
        return len(failed)


def _signature() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
