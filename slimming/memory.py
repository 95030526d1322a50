"""Memory that one training step frees and the next one takes again, without asking the system."""

import ctypes
import sys

# <malloc.h> of glibc: parameters of mallopt
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
REUSE = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}
# where glibc's own, moving thresholds settle once blocks of many MB were freed
DEFAULT = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the process keep the memory it frees; whether that could be set.

    By default glibc returns large blocks to the system, which hands them out again as new pages,
    each cleared and mapped at its first touch: feature maps on the CPU pay for it in every step.
    ``keep=False`` is that default. Peak memory is the same. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False  # another C library
    results = [mallopt(name, value) for name, value in (REUSE if keep else DEFAULT).items()]
    return all(results)
