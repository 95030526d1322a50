"""Errors that the user can fix, and failures of the machine.

`slimming.cli.entry.run` prints the former as one line and exits. The latter may be raised by
anything that runs: code that explains errors of one thing, such as a file, must not explain these
by it.
"""

import re

DEAD_WORKER = re.compile(r"DataLoader worker \(pid")  # an error inside a worker names no pid
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


class UserError(Exception):
    """Wrong flags, files or data. The message says what is wrong and what to do: exit status 2."""

    status = 2


class Diverged(UserError):
    """The loss is no longer finite: exit status 1."""

    status = 1


class Interrupted(UserError):
    """Ctrl-C; the message says how to continue: exit status 130."""

    status = 130


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
