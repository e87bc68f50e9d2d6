"""What gives out is told with numbers, and never as a traceback."""

import errno

import pytest
import safetensors.torch
import torch

from clustermim.errors import InputError, Interrupted, NonFiniteLossError, ResourceError
from clustermim.runs import atomic_save
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.trouble import advice, more_parts, resumable

CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_MEMORY)]
)
def test_out_of_memory_names_the_next_numbers(error):
    words = r"--accumulate 4: .*parts of 16 instead of 32 images.*--batch-size such as 32"
    with pytest.raises(ResourceError, match=words) as told, advice(64, accumulate=2):
        raise error
    assert told.value.again == {"accumulate": 4}
    assert told.value.exit_code == 4


def test_the_numbers_proposed_are_possible():
    assert more_parts(90, 2) == 5  # 4 does not divide 90
    assert more_parts(8, 8) is None
    for batch, parts, processes in ((64, 1, 1), (96, 3, 2), (30, 2, 1), (7, 1, 1)):
        with pytest.raises(ResourceError) as told, advice(batch, accumulate=parts, processes=processes):
            raise MemoryError
        assert batch % (told.value.again["accumulate"] * processes) == 0
        assert told.value.again["accumulate"] >= 2 * parts
    with pytest.raises(ResourceError, match="smaller --model") as told, advice(2, accumulate=1, processes=2):
        raise MemoryError
    assert told.value.again is None
    with pytest.raises(ResourceError, match="--batch-size such as 4") as told, advice(8):
        raise MemoryError
    assert told.value.again is None


def test_dead_processes():
    with pytest.raises(ResourceError, match="--workers 0"), advice(8):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(ResourceError, match="Another process of this run"), advice(8, processes=2):
        raise lost
    with pytest.raises(RuntimeError, match="closed by peer"), advice(8):
        raise lost
    with pytest.raises(RuntimeError, match="a fault of the code"), advice(8, processes=2):
        raise RuntimeError("a fault of the code")


def test_errors_of_a_run_know_how_to_go_on():
    with pytest.raises(NonFiniteLossError) as told, resumable(lr=0.5):
        raise NonFiniteLossError("nan")
    assert told.value.again == {"lr": 0.5, "resume": True}
    with pytest.raises(ResourceError) as told, resumable(lr=0.5):
        raise ResourceError("memory", again={"accumulate": 2})
    assert told.value.again == {"accumulate": 2, "resume": True}
    with pytest.raises(InputError) as told, resumable():
        raise InputError("wrong")
    assert told.value.again is None
    with pytest.raises(Interrupted), resumable():
        raise KeyboardInterrupt


class FullDisk:
    """A file that takes some bytes and then no more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("room", [0, 300, 5000, 40_000])
def test_a_full_disk_wherever_it_strikes_keeps_the_checkpoint_before(tmp_path, monkeypatch, room):
    from pathlib import Path

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"weights": torch.zeros(10_000)})
    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path,
            "open",
            lambda self, mode="r": FullDisk(opened(self, mode), room) if mode == "wb" else opened(self, mode),
        )
        with pytest.raises(ResourceError, match="No space left"):
            checkpoints.save(2, {"weights": torch.ones(10_000)})
    step, state = checkpoints.load_latest()
    assert (step, float(state["weights"].sum())) == (1, 0.0)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_safetensors_says_of_a_full_disk_is_understood(tmp_path):
    def write(path):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(ResourceError, match="No space left"):
        atomic_save(tmp_path / "encoder.safetensors", write)
    with pytest.raises(safetensors.SafetensorError):
        atomic_save(tmp_path / "b", lambda path: (_ for _ in ()).throw(safetensors.SafetensorError("no such dtype")))
    assert list(tmp_path.iterdir()) == []


def test_when_every_checkpoint_is_damaged_it_is_said(tmp_path):
    heard = []
    checkpoints = Checkpoints(tmp_path, warn=heard.append)
    for step in (5, 10):
        checkpoints.save(step, {"weights": torch.zeros(10)}).write_bytes(b"")
    assert checkpoints.load_latest() is None
    assert "the one before, of step 5" in heard[0]
    assert "begins anew" in heard[1]
