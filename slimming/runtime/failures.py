"""Failures of the machine, which anything that runs may raise.

Code that explains errors of one thing, such as a file, must not explain these by it.
"""

import contextlib
import re
import signal
import threading
from collections.abc import Iterator

DEAD_WORKER = re.compile(r"DataLoader worker \(pid")  # an error inside a worker names no pid
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def is_dead_worker(error: BaseException) -> bool:
    """Whether PyTorch reports that a process of a DataLoader was killed."""
    return isinstance(error, RuntimeError) and bool(DEAD_WORKER.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated, on the CPU or a GPU."""
    said = str(error).lower()
    tells = isinstance(error, RuntimeError | OSError) and any(w in said for w in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or tells


def raise_if_of_the_machine(error: BaseException) -> None:
    """Raise ``error`` again if memory ran out or a process of a DataLoader died: it does not tell
    anything about the file or the network that the failed code worked on."""
    if is_dead_worker(error) or is_out_of_memory(error):
        raise error


def dead_worker_text(error: BaseException) -> str:
    """What happened and what to do, in one line, if `is_dead_worker`."""
    reason = " ".join(str(error).split()).partition(". ")[0]
    return (
        f"a process that loads images died ({reason}), probably because memory or shared memory "
        "ran out: use fewer workers, or raise the limits (docker run --shm-size)"
    )


@contextlib.contextmanager
def deaths_of_workers_wait() -> Iterator[None]:
    """In the block, a DataLoader may start its processes without its signal handler.

    That handler raises the death of a process in whatever code the main process runs at that
    moment. Without it, the DataLoader itself raises as soon as it waits for that process.
    """
    main = threading.current_thread() is threading.main_thread()
    number = getattr(signal, "SIGCHLD", None) if main else None  # Windows has no SIGCHLD
    before = None if number is None else signal.getsignal(number)
    try:
        yield
    finally:
        if number is not None and before is not None and signal.getsignal(number) != before:
            signal.signal(number, before)
