"""Optional libraries: a missing one disables a feature, or raises an error that says what to
install."""

import functools
import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from slimming.errors import UserError

LEFT_OUT = {  # what is missing without the library
    "tensorboard": "no event files are written",
    "matplotlib": "no pictures are drawn",
    "tqdm": "no progress bars are shown",
}


@functools.cache
def load(library: str, module: str | None = None) -> ModuleType | None:
    """The ``module`` that needs ``library``, by default the library itself; None if unavailable.

    Prints once what is `LEFT_OUT`.
    """
    try:
        return importlib.import_module(module or library)
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        consequence = f"{LEFT_OUT[library]} (pip install {library})"
        print(f"note: {library} is unavailable ({reason}): {consequence}", flush=True)
        return None


def need(module: str, library: str, purpose: str, packages: str = "") -> None:
    """UserError if ``module`` of the pip package ``library``, which ``purpose`` needs, is
    unavailable. ``packages``: what pip should install, if not only ``library``."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs {library}, which is unavailable ({error}): pip install "
            f"{packages or library}"
        ) from error


def bar(items: Iterable = (), **settings: Any) -> Any:
    """tqdm's progress bar over ``items`` with ``settings``; without tqdm, a disabled one."""
    tqdm = load("tqdm")
    return tqdm.tqdm(items, **settings) if tqdm else _Silent(items)


class _Silent:
    """A disabled progress bar with the part of tqdm's interface that is used here."""

    disable = True
    n = 0

    def __init__(self, items: Iterable):
        self.items = items

    def __iter__(self) -> Iterator:
        return iter(self.items)

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: float = 1) -> None:
        pass

    def clear(self) -> None:
        pass

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        pass
