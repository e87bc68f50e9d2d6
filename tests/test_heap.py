"""Freed memory is kept for its next use where the C library is glibc and nobody has said otherwise."""

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import numpy as np
from clustermim.heap import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else False)
def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(100_000_000, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
use()
print(use())
"""


def faults(word: str, **variables: str) -> tuple[bool, int]:
    """Whether memory is kept, and page faults of using 100 MB a second time, in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", COUNT, word]
    said = subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True).stdout.split()
    return said[0] == "True", int(said[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_memory_used_again_is_not_mapped_again() -> None:
    kept, few = faults("keep")
    plain, many = faults("leave")
    assert kept and not plain
    assert few < many / 4


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_who_set_malloc_is_heard(name: str) -> None:
    value = "glibc.malloc.trim_threshold=1000000" if name == "GLIBC_TUNABLES" else "1000000"
    kept, _ = faults("keep", **{name: value})
    assert not kept
