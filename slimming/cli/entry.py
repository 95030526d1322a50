"""Run a script's main; print errors as one line and set the exit status."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from slimming.cli import flags
from slimming.errors import (
    Interrupted,
    UserError,
    dead_worker_text,
    is_dead_worker,
    is_out_of_memory,
)
from slimming.runtime import distributed
from slimming.runtime.device import keep_freed_memory

DEBUG = "SLIMMING_DEBUG"  # a variable of the environment: if set, errors also show their traceback


def run(main: Callable[[], None]) -> None:
    """Run a script's main; print an error that the user can fix as one line on stderr, and exit.

    Under torchrun the first process prints that line; another process prints only an error that
    the first one does not have.
    """
    keep_freed_memory()
    if not distributed.launched() and threading.current_thread() is threading.main_thread():
        _end_like_ctrl_c()
        if os.name == "posix":  # elsewhere os.kill would end the process at once
            sys.unraisablehook = _interrupt_again
    try:
        main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)  # the reader of the output has exited: print nothing
    except (Exception, KeyboardInterrupt) as error:
        status, message = _explain(error)
        # every process gets Ctrl-C: only the first one prints it
        if status != Interrupted.status or distributed.is_first_process():
            distributed.wait_for_other_errors(explained=message is not None)
            if message is None:
                raise
            if os.environ.get(DEBUG):
                traceback.print_exc()
            words = flags.named(message).split()
            line = f"{os.path.basename(sys.argv[0])}: {' '.join(words)}\n"
            sys.stderr.write(line)  # one call: other processes write too
    else:
        status = 0
    if distributed.launched():
        # threads of the process group may still use Python while it shuts down, and abort the
        # process ("terminate called without an active exception"): exit without the shutdown
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def _end_like_ctrl_c() -> None:
    """At SIGTERM, which schedulers send, and SIGHUP, when a connection is lost: temporary files are
    removed, and a line says how to continue."""

    def end(*_: object) -> None:
        if hasattr(signal, "SIGCHLD"):  # they send it to the workers of a loader, too, whose end
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # is then no error
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, end)


def _interrupt_again(lost: Any) -> None:
    """Python drops a KeyboardInterrupt that comes in a destructor or a weak reference's callback,
    which torch.export has many of: the main thread gets it once more."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(lost)


def _explain(error: BaseException) -> tuple[int, str | None]:
    """The exit status and message of an error; message None if it needs a traceback."""
    if isinstance(error, UserError):
        return error.status, str(error) if isinstance(error, Interrupted) else f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.status, "interrupted: no results were lost; run the command again"
    if is_out_of_memory(error):
        return 2, "error: out of memory: lower --batch-size or --test-batch-size"
    if is_dead_worker(error):
        return 2, f"error: {dead_worker_text(error)}"
    if isinstance(error, OSError):
        return 2, f"error: {error} ({DEBUG}=1 shows where)"
    if isinstance(error, RuntimeError) and "deterministic implementation" in str(error):
        operation = str(error).split()[0]
        return 2, f"error: {operation} has no deterministic CUDA kernel: omit --deterministic"
    return 1, None
