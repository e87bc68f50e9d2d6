"""Devices and requests to stop."""

import os
import signal
import time

import pytest
import torch

from clustermim.errors import InputError, Stopped
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


def test_a_request_reaches_whoever_listens_outside_and_inside():
    with listen_for_stop() as outer:
        os.kill(os.getpid(), signal.SIGTERM)
        with listen_for_stop() as inner:
            assert inner.reason == "by SIGTERM"  # it came before anybody listened here
    with listen_for_stop() as outer:
        with listen_for_stop() as inner:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert outer.reason is None
        assert outer.reason == inner.reason == "by SIGUSR1"  # the work inside may have ended without looking


@pytest.mark.parametrize("minutes", [None, 0.05 / 60])
def test_work_that_does_not_look_is_broken_off(minutes):
    came_by = []

    def work():
        try:
            if minutes is None:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        except Exception:  # what swallows every error does not swallow the request
            came_by.append("swallowed")
        finally:
            came_by.append("cleaned up")

    began = time.monotonic()
    with listen_for_stop(minutes) as stop, pytest.raises(Stopped, match=r"SIGTERM|--max-minutes"):
        stop.breaking_off(work)
    assert time.monotonic() - began < 5
    assert came_by == ["cleaned up"]
    with listen_for_stop() as stop:
        assert stop.breaking_off(lambda: 7) == 7
        os.kill(os.getpid(), signal.SIGTERM)  # between two pieces of work it is remembered, no more
        with pytest.raises(Stopped):
            stop.breaking_off(lambda: came_by.append("begun"))
    assert came_by == ["cleaned up"]
