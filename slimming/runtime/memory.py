"""Memory that one training step frees and the next one takes again, without asking the system."""

import ctypes
import sys

# <malloc.h> of glibc: parameters of mallopt
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let the process keep the memory it frees; whether that could be set.

    By default glibc returns large blocks to the system, which hands them out again as new pages,
    each cleared and mapped at its first touch: feature maps on the CPU pay for it in every step.
    Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False  # another C library
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
