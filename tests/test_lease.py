"""A lease: one holder at a time, whatever the others do at the same moment."""

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from clustermim import lease as module
from clustermim.errors import InputError, ResourceError
from clustermim.lease import Lease

DEAD = {"host": socket.gethostname(), "pid": 2**22 + 1, "start": "1"}


def contend(path: Path, count: int) -> list[Lease]:
    """As many threads as told try for the lock at one moment; those that got it."""
    won: list[Lease] = []
    start = threading.Barrier(count)

    def one() -> None:
        lease = Lease(path)
        start.wait()
        try:
            lease.acquire()
        except InputError:
            return
        won.append(lease)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


@pytest.mark.parametrize("state", ["free", "dead", "torn"])
def test_one_of_many_gets_the_lock(tmp_path: Path, state: str) -> None:
    for trial in range(30):
        path = tmp_path / str(trial) / "lock"
        path.parent.mkdir()
        if state != "free":
            path.write_text(json.dumps(DEAD) if state == "dead" else "{")
        won = contend(path, 8)
        assert len(won) == 1
        won[0].release()
        assert not path.exists()


def test_the_slow_one_of_two_does_not_remove_the_lock_of_the_fast_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps(DEAD))
    fast, slow = Lease(path), Lease(path)
    look = Lease._alive

    def overtaken(self: Lease, holder: dict[str, object]) -> bool:
        """The slow one has just found the lock dead when the fast one takes it."""
        alive = look(self, holder)
        if self is slow and not alive:
            fast.acquire()
        return alive

    monkeypatch.setattr(Lease, "_alive", overtaken)
    with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        slow.acquire()
    assert fast._ours()
    fast.release()
    assert not path.exists()


def test_one_that_stood_still_too_long_learns_that_another_took_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HEARTBEAT_SECONDS", 0.01)
    lease = Lease(tmp_path / "lock")
    lease.acquire()
    lease.confirm()
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": None, "name": "other"}))
    assert lease._lost.wait(10)
    with pytest.raises(ResourceError, match="taken over"):
        lease.confirm()
    lease.release()
    assert (tmp_path / "lock").exists()  # the other one's lock stays
