"""A lease: a lock file that says who holds it and beats while held, so that a dead holder's is taken over.

It works between processes of one machine (a process that is gone, or whose number came round again, holds nothing) and
between machines that share a file system (a holder that has not beaten for `LEASE_SECONDS` counts as gone).
"""

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clustermim.errors import InputError, ResourceError

LEASE_SECONDS = 120.0
"""A lock of another host whose heartbeat is older than this counts as abandoned."""

_HEARTBEAT_SECONDS = 20.0
_PATIENCE_SECONDS = 30.0


class Lease:
    """A lock file at `path`, held by at most one process of all those that can see it.

    Parameters
    ----------
    path
        The lock file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = uuid.uuid4().hex
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        InputError
            Somebody alive holds it; the message names the process and the host.
        """
        while not self._create():
            holder = self._holder()
            if holder is None:
                continue
            if holder and self._alive(holder):
                raise InputError(
                    f"{self.path.parent} is in use by process {holder.get('pid')} on {holder.get('host')}. "
                    "Wait for it to end, or choose another --out."
                )
            self._bury(holder)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)
            self._thread = None
            with contextlib.suppress(OSError):  # a folder that vanished holds no lock
                if self._ours():
                    self.path.unlink(missing_ok=True)

    def confirm(self) -> None:
        """Make sure that the lock is still there and ours.

        Raises
        ------
        ResourceError
            This process was held up for longer than a lease lasts and another one took over, or the folder is gone.
        """
        try:
            holder = self._holder()
        except OSError as error:
            raise ResourceError(
                f"{self.path.parent} can no longer be read: {error.strerror or error}. Nothing more is written; bring "
                "it back."
            ) from error
        if holder is None:
            raise ResourceError(
                f"{self.path} is gone: somebody removed or moved it, or the whole folder. Nothing more is written; "
                "bring the folder back."
            )
        if self._lost.is_set() or holder.get("name") != self._name:
            raise ResourceError(
                f"{self.path.parent} was taken over by another process while this one stood still for more than "
                f"{LEASE_SECONDS:.0f} seconds. Nothing more is written from here; the other one goes on."
            )

    def _create(self) -> bool:
        """Link a complete lock file into place: a link fails where one exists, and is never seen half-written."""
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".partial-lock-")
        pid = os.getpid()
        card = {"host": socket.gethostname(), "pid": pid, "start": _process_start(pid), "name": self._name}
        with os.fdopen(handle, "w") as file:
            json.dump(card, file)
        try:
            os.link(name, self.path)
        except FileExistsError:
            return False
        else:
            return True
        finally:
            Path(name).unlink(missing_ok=True)

    def _bury(self, dead: dict[str, Any]) -> None:
        """Remove a dead holder's lock, one process at a time: between look and removal nobody else can do the same.

        Without the guard, of two that find the same lock dead the slower one would remove the lock that the faster
        one has just made. While a dead lock lies there nobody can make another, so what is removed is what was seen.
        """
        try:
            with FileLock(self.path.with_name(f".partial-{self.path.name}-guard"), timeout=_PATIENCE_SECONDS):
                if self._holder() == dead:
                    self.path.unlink(missing_ok=True)
        except Timeout:
            raise InputError(f"{self.path.parent} is in use: its lock is being taken by others. Try later.") from None

    def _holder(self) -> dict[str, Any] | None:
        """What the lock file says; None where there is none, nothing where what it says makes no sense."""
        try:
            holder = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _ours(self) -> bool:
        holder = self._holder()
        return holder is not None and holder.get("name") == self._name

    def _alive(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == socket.gethostname():
            pid = int(holder.get("pid", -1))
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return False
            except PermissionError:
                return True
            # A number that came round again belongs to another process, which started at another time.
            return holder.get("start") is None or holder["start"] == _process_start(pid)
        try:
            return time.time() - self.path.stat().st_mtime < LEASE_SECONDS
        except OSError:
            return False

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                holder = self._holder()
                if holder and holder.get("name") != self._name:
                    self._lost.set()
                    return
                os.utime(self.path)


def _process_start(pid: int) -> str | None:
    """When a local process started, in clock ticks since boot; None where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None
