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
    """Signals that end a script inside the context are handled where it is over, also by an error:
    C++ code that calls Python would take a KeyboardInterrupt for an error of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    names = (name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
    numbers = [getattr(signal, name) for name in names]  # Windows has no SIGHUP
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)
