"""Devices and requests to stop."""

import os
import signal
import time
import timeit

import pytest
import torch

from clustermim.errors import InputError, Stopped
from clustermim.products import multiplies_bfloat16
from clustermim.training import launch
from clustermim.training.launch import agree, listen_for_stop, make_fabric, resolve_device, resolve_precision


def test_devices():
    assert resolve_device("cpu") == "cpu"
    assert resolve_precision("auto", "cpu") == "32-true"
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no such device"):
            make_fabric("cuda")
    with pytest.raises(InputError, match="at least one"):
        make_fabric("cpu", 0)
    fabric = make_fabric("cpu")
    assert fabric.world_size == 1
    assert agree(fabric, True)
    assert not agree(fabric, False)


def test_bf16_is_refused_where_it_would_take_a_hundred_times_as_long(monkeypatch):
    monkeypatch.setattr(launch, "multiplies_bfloat16", lambda: True)
    assert resolve_precision("bf16-mixed", "cpu") == "bf16-mixed"
    monkeypatch.setattr(launch, "multiplies_bfloat16", lambda: False)
    assert resolve_precision("bf16-mixed", "cuda") == "bf16-mixed"
    assert resolve_precision("auto", "cpu") == "32-true"
    with pytest.raises(InputError, match=r"no fast products in bfloat16.*Use --precision 32-true"):
        make_fabric("cpu", precision="bf16-mixed")


def test_what_the_processor_is_said_to_multiply_is_what_it_does():
    side = 256
    seconds = {}
    for kind in (torch.float32, torch.bfloat16):
        square = torch.ones(side, side, dtype=kind)
        seconds[kind] = min(timeit.repeat("s @ s", globals={"s": square}, number=1, repeat=5))
    assert multiplies_bfloat16() == (seconds[torch.bfloat16] < 15 * seconds[torch.float32])


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
