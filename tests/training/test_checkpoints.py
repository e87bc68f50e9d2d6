"""Checkpoints: whole or absent, checked, two kept; intervals of steps and of time."""

import pytest
import torch

from clustermim.errors import InputError
from clustermim.training.checkpoints import Checkpoints, Due, Interval, parse_interval


def test_round_trip_and_two_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.load_latest() is None
    for step in (1, 2, 3):
        checkpoints.save(
            step, {"weights": torch.full((3,), step), "seconds": 1.5, "rows": [(1, {"loss": torch.ones(())})]}
        )
    assert len(checkpoints.paths()) == 2
    step, state = checkpoints.load_latest()
    assert (step, state["seconds"], state["weights"].tolist()) == (3, 1.5, [3, 3, 3])
    checkpoints.save(3, {"weights": torch.zeros(3)})
    assert len(checkpoints.paths()) == 2
    assert checkpoints.load_latest()[1]["weights"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_one_is_skipped_with_a_word(tmp_path, damage):
    heard = []
    checkpoints = Checkpoints(tmp_path, warn=heard.append)
    for step in (5, 10):
        path = checkpoints.save(step, {"weights": torch.full((1000,), step)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-100], "flip": content, "empty": b""}[damage])
    step, state = checkpoints.load_latest()
    assert step == 5
    assert state["weights"][0] == 5
    assert len(heard) == 1
    assert path.name in heard[0]


def test_what_a_kill_leaves_behind_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, {"weights": torch.zeros(1)})
    (tmp_path / ".partial-abc.pt").write_bytes(b"half")
    (tmp_path / "step-00000008.pt").write_bytes(b"complete but unnamed")
    assert checkpoints.load_latest()[0] == 4
    assert [p.name for p in tmp_path.iterdir()] == [checkpoints.paths()[0].name]


def test_intervals():
    assert parse_interval("500") == parse_interval(500) == Interval(steps=500)
    assert parse_interval("10m") == Interval(seconds=600)
    assert parse_interval("1.5h") == Interval(seconds=5400)
    assert parse_interval("30s") == Interval(seconds=30)
    for bad in ("", "0", "-5", "1.5", "10 days", "m"):
        with pytest.raises(InputError, match="checkpoint-every"):
            parse_interval(bad)


def test_due():
    due = Due(Interval(steps=10), step=13)
    assert [step for step in range(14, 41) if due.due(step)] == [20, 30, 40]
    assert Due(Interval(seconds=0.0)).due(1)
    assert not Due(Interval(seconds=60.0)).due(1)
