"""A script's main: errors as one line and a status."""

import os
import sys
from collections.abc import Callable

from slimming.errors import Interrupted, UserError
from slimming.runtime import distributed
from slimming.runtime.memory import keep_freed_memory


def run(main: Callable[[], None]) -> None:
    """Run a script's main; what a person can put right becomes one line on stderr and a status.

    Under torchrun that line is the first process's; another one tells what it alone has met.
    """
    keep_freed_memory()
    try:
        main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)  # whoever read the output went away: nobody to tell
    except (Exception, KeyboardInterrupt) as error:
        status, message = _explain(error)
        if status != Interrupted.status or distributed.speaks():  # Ctrl-C reaches all
            distributed.let_others_speak(explained=message is not None)
            if message is None:
                raise
            line = f"{os.path.basename(sys.argv[0])}: {' '.join(message.split())}\n"
            sys.stderr.write(line)  # at once: others write too
    else:
        status = 0
    if distributed.launched():
        # threads of the process group may still want Python while it is being taken down, and
        # abort the process ("terminate called without an active exception"): all is done
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def _explain(error: BaseException) -> tuple[int, str | None]:
    """The exit status and the line of an error; None where only a traceback explains it."""
    if isinstance(error, UserError):
        return error.status, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.status, "interrupted: nothing was lost, start it again"
    if isinstance(error, OSError):
        return 2, f"error: {error}"
    if isinstance(error, MemoryError | RuntimeError) and _is_out_of_memory(error):
        return 2, "error: out of memory: lower --batch-size or --test-batch-size"
    return 1, None


def _is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(w in str(error) for w in words)
