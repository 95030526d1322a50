"""Exporters that keep to themselves: no progress, no warnings, no usage statistics."""

import contextlib
import io
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

# OpenVINO and NNCF send usage statistics with this package, in processes of its own; without it
# they send none
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside the context nothing is printed, and warnings are ignored; errors are raised."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """Ctrl-C inside the context ends it where it is over: C++ code that calls Python would take a
    KeyboardInterrupt for an error of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
