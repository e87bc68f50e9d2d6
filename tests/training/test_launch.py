"""Devices and requests to stop."""

import os
import signal

import pytest
import torch

from clustermim.errors import InputError
from clustermim.training.launch import agree, listen_for_stop, make_fabric, resolve_device, resolve_precision


def test_devices():
    assert resolve_device("cpu") == "cpu"
    assert resolve_precision("auto", "cpu") == "32-true"
    assert resolve_precision("bf16-mixed", "cpu") == "bf16-mixed"
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no such device"):
            make_fabric("cuda")
    with pytest.raises(InputError, match="at least one"):
        make_fabric("cpu", 0)
    fabric = make_fabric("cpu")
    assert fabric.world_size == 1
    assert agree(fabric, True)
    assert not agree(fabric, False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with listen_for_stop() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert number.name in stop.reason
        assert not stop.interrupted
    assert signal.getsignal(number) == before


def test_a_second_interrupt_does_not_wait():
    with listen_for_stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_time_limit():
    with listen_for_stop(max_minutes=0.0) as stop:
        assert "max-minutes" in stop.reason
    with listen_for_stop(max_minutes=5.0) as stop:
        assert stop.reason is None
