"""Reuse memory that a training step frees in the next step, without returning it to the system."""

import ctypes
import sys

# <malloc.h> of glibc: parameters of mallopt
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees; return whether that succeeded.

    By default glibc returns large blocks to the system and gets them back as new pages, which the
    system clears and maps on first use: every step pays that for its feature maps on the CPU.
    Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False  # another C library
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
