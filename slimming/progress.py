"""One line on the terminal where a step that usually takes a moment takes longer."""

import contextlib
import sys
import threading
from collections.abc import Iterator

AFTER = 2.0  # seconds


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Print ``what`` on stderr, if it is a terminal, once the block has taken `AFTER` seconds."""

    def tell() -> None:
        print(f"{what} ...", file=sys.stderr, flush=True)

    timer = threading.Timer(AFTER, tell)
    timer.daemon = True  # an interrupted program ends at once
    if sys.stderr is not None and sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
