"""What may give out under a training (memory, a process that reads images, another process), told with a remedy."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from clustermim.errors import ClusterMIMError, Interrupted, ResourceError

_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_PEERS = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe", "ProcessGroup")


@contextlib.contextmanager
def advice(batch_size: int, *, accumulate: int | None = None, processes: int = 1) -> Iterator[None]:
    """Turn the many ways in which memory or processes give out into one error that says what to do.

    Parameters
    ----------
    batch_size
        Images a step, over all processes.
    accumulate
        Parts in which a step is computed; None where there is no such option.
    processes
        Of the run.

    Raises
    ------
    ResourceError
        With the numbers to try next.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise out_of_memory(error, batch_size, accumulate, processes) from error
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, ClusterMIMError):
            raise
        if any(words in text for words in _MEMORY):
            raise out_of_memory(error, batch_size, accumulate, processes) from error
        if "DataLoader worker" in text:
            raise dead_worker(error) from error
        if processes > 1 and any(words in text for words in _PEERS):
            raise ResourceError(
                "Another process of this run ended or could not be reached, so this one ends too; what it said stands "
                f"above or on its machine ({_first_line(error)}). The last checkpoint is kept."
            ) from error
        raise


def out_of_memory(
    error: BaseException, batch_size: int, accumulate: int | None = None, processes: int = 1
) -> ResourceError:
    """The error for memory that ran out, with the next numbers to try."""
    part = batch_size // (processes * (accumulate or 1))
    smaller = max(processes, batch_size // 2 // processes * processes)
    parts = None if accumulate is None else more_parts(batch_size // processes, accumulate)
    if parts is not None:
        ways = (
            f"Add --accumulate {parts}: the same training, computed in parts of {batch_size // processes // parts} "
            f"instead of {part} images. Or start anew with another --out and a smaller --batch-size such as {smaller}."
        )
    elif batch_size > processes:
        ways = f"Use a smaller --batch-size such as {smaller}, with another --out."
    else:
        ways = (
            "Already one image at a time does not fit: add --activation-checkpointing where there is such an option, "
            "or use a smaller --model or --image-size with another --out."
        )
    return ResourceError(
        f"Out of memory with {part} images at a time ({_first_line(error)}). {ways}",
        again=None if parts is None else {"accumulate": parts},
    )


def more_parts(images: int, parts: int) -> int | None:
    """The next number of parts, at least twice as many, that divides so many images; None where there is none."""
    return next((number for number in range(2 * parts, images + 1) if images % number == 0), None)


def dead_worker(error: BaseException) -> ResourceError:
    """The error for a process that reads images and died."""
    return ResourceError(
        f"A process that reads images died ({_first_line(error)}). Most often memory or shared memory (/dev/shm) ran "
        "out: use fewer --workers, or --workers 0 to read in the main process."
    )


@contextlib.contextmanager
def resumable(**changes: Any) -> Iterator[None]:
    """Let the errors of a run that `--resume` continues say so: the command line then prints the command to type.

    Parameters
    ----------
    changes
        Options to propose where the loss was not finite.
    """
    try:
        yield
    except ClusterMIMError as error:
        if error.exit_code in (3, 4, 75):
            proposed = changes if error.exit_code == 3 else {}
            error.again = {**(error.again or {}), **proposed, "resume": True}
        raise
    except Interrupted:
        raise
    except KeyboardInterrupt as error:  # a second Ctrl-C, or one outside of the loop
        raise Interrupted from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no details"])[0].strip() or "no details"
