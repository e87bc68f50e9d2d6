"""What glibc does with the memory that a process frees."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_NEVER = 2**31 - 1
_OWN_WORDS = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let freed memory wait for its next use instead of going back to the system; says whether that was arranged.

    A training step frees and asks for the same tensors again and again. Given back in between, every page of them is
    zeroed and mapped anew: 200 MB of a ViT-S/16 step, and a thirtieth of its time. Whoever set malloc's own variables
    is heard, and where the C library is not glibc nothing changes.
    """
    if any(name.startswith(_OWN_WORDS) for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(option, _NEVER) == 1 for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
