"""Where training runs: devices, processes and precision through Lightning Fabric, and requests to stop."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
from lightning_fabric import Fabric

from clustermim.errors import ClusterMIMError, InputError, Stopped
from clustermim.products import multiplies_bfloat16
from clustermim.runs import RunDirectory
from clustermim.training.sharding import sharding

Result = TypeVar("Result")
Device = Literal["auto", "cpu", "cuda", "mps"]
Strategy = Literal["auto", "ddp", "fsdp"]
Precision = Literal["auto", "32-true", "bf16-mixed", "64-true"]


def resolve_device(device: Device = "auto") -> str:
    """`auto` is CUDA where there is one, else Apple's MPS, else the CPU.

    Raises
    ------
    InputError
        The device asked for is not there.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if present[name])
    if not present[device]:
        there = ", ".join(name for name, here in present.items() if here)
        raise InputError(f"--device {device}: PyTorch finds no such device on this machine. There is: {there}.")
    return device


def trains_in(precision: Precision, device: str) -> bool:
    """Whether the device computes in this precision at a usable speed: not in bf16-mixed on a CPU without the units."""
    return precision != "bf16-mixed" or device != "cpu" or multiplies_bfloat16()


def resolve_precision(precision: Precision, device: str) -> Literal["32-true", "bf16-mixed", "64-true"]:
    """`auto` is bf16-mixed on a CUDA device that computes in bfloat16, else 32-true.

    Raises
    ------
    InputError
        bf16-mixed on a CPU that would take a hundred times as long with it.
    """
    if precision == "auto":
        return "bf16-mixed" if device == "cuda" and torch.cuda.is_bf16_supported() else "32-true"
    if not trains_in(precision, device):
        raise InputError(
            "--precision bf16-mixed: this processor has no fast products in bfloat16 and would take a hundred times as "
            "long with them. Use --precision 32-true."
        )
    return precision


def make_fabric(
    device: Device = "auto", devices: int = 1, precision: Precision = "auto", strategy: Strategy = "auto"
) -> Fabric:
    """A Fabric that is ready to launch; under `torchrun` or SLURM it joins the processes that were started.

    Parameters
    ----------
    device
        Kind of device.
    devices
        How many of them in this machine; more than one trains data-parallel, a process each.
    precision
        `32-true`, `bf16-mixed` (weights and optimiser in 32 bits, matrix products in bfloat16), `64-true` (to compare
        computations with each other), or `auto`.
    strategy
        `ddp`: every process holds all weights. `fsdp`: each holds a part of them (see `sharding`). `auto`: `ddp` where
        there are several processes.

    Raises
    ------
    InputError
        The device is not there, or there are fewer than `devices`, or it cannot do `strategy` or `precision`.
    """
    kind = resolve_device(device)
    width = resolve_precision(precision, kind)
    started = os.environ.get("LOCAL_WORLD_SIZE")
    nodes = 1
    if started is not None:  # torchrun has started the processes and says how many
        devices = int(started)
        nodes = max(1, int(os.environ.get("WORLD_SIZE", started)) // devices)
    if devices < 1:
        raise InputError(f"--devices {devices}: at least one is needed.")
    there = torch.cuda.device_count() if kind == "cuda" else 1 if kind == "mps" else None
    if there is not None and devices > there:
        raise InputError(f"--devices {devices}: this machine has {there} {kind} device(s).")
    if kind == "cuda":
        # TensorFloat-32 products: the precision that 32-true is expected to have on these devices, at several times
        # the speed; losses and norms stay in full 32 bits.
        torch.set_float32_matmul_precision("high")
    return Fabric(
        accelerator=kind,
        devices=devices,
        num_nodes=nodes,
        strategy=_strategy(strategy, kind, width, devices * nodes),
        precision=width,
    )


def _strategy(strategy: Strategy, device: str, precision: str, processes: int) -> Any:
    if strategy == "fsdp":
        if device == "mps":
            raise InputError("--strategy fsdp: PyTorch can do that on CUDA and on a CPU, not on mps. Leave it out.")
        if precision == "64-true":
            raise InputError("--strategy fsdp computes in 32 bits or bf16-mixed, not in 64. Use --precision 32-true.")
        return sharding(processes)
    return "ddp" if strategy == "ddp" or processes > 1 else "auto"


def exact_fabric(device: Device, devices: int) -> Fabric:
    """A Fabric to launch whose products keep all bits of float32, because near centroids differ in few of them.

    Parameters
    ----------
    device, devices
        As for `make_fabric`.
    """
    before = torch.get_float32_matmul_precision()
    fabric = make_fabric(device, devices, "32-true")
    torch.set_float32_matmul_precision(before)
    return fabric


def agree(fabric: Fabric, wish: bool) -> bool:
    """Whether any process wishes it; all of them must ask together. Costs nothing in a single process."""
    if fabric.world_size == 1:
        return wish
    total: Any = fabric.all_reduce(torch.tensor(float(wish), device=fabric.device), reduce_op="sum")
    return bool(total.item() > 0)


class _AtOnce(BaseException):
    """What breaks off work that does not look for requests; no `except Exception` on the way may hold it up."""


class StopRequest:
    """Whether training has been asked to stop, and by what; see `listen_for_stop`."""

    def __init__(self, max_seconds: float | None = None) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._signal: int | None = None
        self._breaks_off = False
        self.interrupted = False

    @property
    def reason(self) -> str | None:
        """Words for the message, or None while nobody has asked."""
        if self._signal is not None:
            return f"by {signal.Signals(self._signal).name}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "at --max-minutes"
        return None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remember the first request. A second Ctrl-C does not wait for the checkpoint."""
        if number == signal.SIGINT and self.interrupted:
            raise KeyboardInterrupt
        self._signal = number
        self.interrupted = number == signal.SIGINT
        self._break_off()

    def breaking_off(self, work: Callable[[], Result]) -> Result:
        """Call work that does not look for requests and leaves nothing half done; a request breaks it off where it is.

        Raises
        ------
        Stopped
            On request; the work has to be repeated.
        """
        try:
            with _alarm(self._deadline, self._break_off):
                try:
                    self._breaks_off = True
                    if self.reason is not None:
                        raise _AtOnce
                    return work()
                finally:
                    self._breaks_off = False
        except _AtOnce:
            raise Stopped(f"Stopped {self.reason}.", again={"resume": True}) from None

    def _take(self, other: "StopRequest") -> None:
        """Know of a request that another has received."""
        if self._signal is None:
            self._signal, self.interrupted = other._signal, other.interrupted

    def _break_off(self) -> None:
        if self._breaks_off:
            self._breaks_off = False  # once: what cleans up on the way out is left in peace
            raise _AtOnce


@contextlib.contextmanager
def _alarm(deadline: float | None, call: Callable[[], None]) -> Iterator[None]:
    """Call something when the time has come; only in the main thread, and where the system has alarms."""
    if deadline is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda number, frame: call())
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def listen_for_stop(max_minutes: float | None = None) -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1 (what SLURM sends before preemption), Ctrl-C, a closed terminal and the time limit into a
    polite request.

    The training loop looks at `reason` between steps, writes a checkpoint and ends. The handlers that stood before are
    put back at the end; where one listens inside another, each knows of a request that the other received. Outside the
    main thread Python allows no handlers, and only the time limit counts. What is ignored stays ignored: under `nohup`
    a closed terminal stops nothing.
    """
    request = StopRequest(None if max_minutes is None else 60.0 * max_minutes)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)  # not every system has all of them
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, request.receive)
    owners = [getattr(handler, "__self__", None) for handler in before.values()]
    outer = next((owner for owner in owners if isinstance(owner, StopRequest)), request)
    request._take(outer)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        outer._take(request)


@contextlib.contextmanager
def enter_on_first(fabric: Fabric, run: RunDirectory) -> Iterator[RunDirectory | None]:
    """Hold the run directory in the first process only, but let all of them fail if it cannot be had.

    Yields
    ------
    RunDirectory or None
        None on all processes but the first.
    """
    with contextlib.ExitStack() as stack:
        by_the_first(fabric, stack.enter_context, run)
        yield run if fabric.is_global_zero else None


def by_the_first(fabric: Fabric, work: Callable[..., Any], *arguments: Any) -> None:
    """Let the first process call `work(*arguments)`, and all of them fail if that fails.

    A process that waits for one that has already left would wait for ever, so all of them must call this together.

    Raises
    ------
    ClusterMIMError
        What `work` raised in the first process.
    """
    problem: ClusterMIMError | None = None
    if fabric.is_global_zero:
        try:
            work(*arguments)
        except ClusterMIMError as error:
            problem = error
    found: Any = problem if fabric.world_size == 1 else fabric.broadcast(problem)
    if found is not None:
        found.shared = True
        raise found
