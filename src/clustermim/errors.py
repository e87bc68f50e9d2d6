"""What can go wrong, as the caller sees it: one class for each exit code, and the nearest valid name.

Every error that a user can cause is raised as one of these, with a message of one paragraph: what is wrong, where,
and what to do. The command line prints the message without a traceback and exits with the class's code.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class ClusterMIMError(Exception):
    """Base of all errors that the package raises on purpose; `exit_code` is what the command line exits with.

    Parameters
    ----------
    message
        One paragraph.
    again
        Options with which to repeat the command, such as ``{"accumulate": 2, "resume": True}``: the command line prints
        the whole of it. None where repeating does not help.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, again: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.again = again
        self.shared = False
        """Whether every process of the run ends by it, so that one exit code speaks for all."""


class InputError(ClusterMIMError, ValueError):
    """The input cannot be used: a wrong path, option, shape or label. Raised before work starts."""

    exit_code = 2


class NonFiniteLossError(ClusterMIMError, ArithmeticError):
    """A loss became NaN or infinite; the last good checkpoint has been kept."""

    exit_code = 3


class ResourceError(ClusterMIMError, RuntimeError):
    """Disk, memory or a worker process gave out."""

    exit_code = 4


class Stopped(ClusterMIMError):
    """Stopped on request (a signal or `--max-minutes`) after a checkpoint; `--resume` continues exactly."""

    exit_code = 75


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, obeyed after a checkpoint; `again` is as for `ClusterMIMError`."""

    again: Mapping[str, Any] = {"resume": True}


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of an error message that names the nearest valid choice and lists the known ones.

    Parameters
    ----------
    name
        What the user typed.
    choices
        Valid names; more than twenty are not listed in full.

    Returns
    -------
    str
        For example ``" Did you mean 'pixel'? Known: pixel, backbone."``; it starts with a space.
    """
    known = sorted(set(choices))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(known[:20]) + (f", and {len(known) - 20} more" if len(known) > 20 else "")
    return f"{hint} Known: {listed}." if known else hint
