"""Runs a function in forked processes: alone to be killed there, or several as one gloo group."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def in_process(function: Callable[[], Any]) -> int:
    """Run it in a process of its own; gives back the exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def in_group(function: Callable[[int], Any], size: int, folder: Path) -> list[Any]:
    """What `function(rank)` gives back in each of the processes of a gloo group; it must be fit for `torch.save`."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_member, args=(function, rank, size, folder)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _member(function: Callable[[int], Any], rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    torch.save(function(rank), folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def start_ranks(command: list[str], size: int) -> list[int]:
    """Run one command line in `size` processes that find each other as torchrun's on as many machines would.

    A fork server that knows the verb already spares each of them the import of torch. Gives back their exit codes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clustermim.verbs.pretrain_encoder"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_rank, args=(command, rank, size, port)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]  # type: ignore[misc]


def _rank(command: list[str], rank: int, size: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"GROUP_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo"}
    from clustermim.cli import run

    sys.exit(run(command))
