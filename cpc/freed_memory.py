"""What glibc does with memory that a CPU training step frees."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""
LARGEST = 2**31 - 1
"""Of an int, which mallopt takes: 2 GiB."""


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed tensors for the next ones; False where the C library is another.

    By default glibc asks the system for every large tensor and gives it back at once, so that each step's activations
    are new pages which the system has to clear and map one by one. A step asks for the same sizes as the last: kept,
    they are there. The process holds what it once needed at most. `benchmarks/freed_memory.py` measures both. The
    numbers of the options are those of glibc's malloc.h (mallopt(3)).

    Example: behind it a process that has freed eight tensors of 16 MiB still holds more than 120 MiB of them.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))
