"""Libraries that not every run needs: without one, what it adds is left out, or one line says what
to install."""

import functools
import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from slimming.errors import UserError

LEFT_OUT = {  # without this library
    "tensorboard": "no event files are written",
    "matplotlib": "no pictures are drawn",
    "tqdm": "no progress bars are shown",
}


@functools.cache
def load(library: str, module: str | None = None) -> ModuleType | None:
    """The ``module`` that needs ``library``, by default that itself; None where it is unavailable.

    The first time that it is, a line says what is `LEFT_OUT`.
    """
    try:
        return importlib.import_module(module or library)
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        told = f"{LEFT_OUT[library]} (pip install {library})"
        print(f"note: {library} is unavailable ({reason}): {told}", flush=True)
        return None


def need(module: str, library: str, purpose: str) -> None:
    """UserError if ``module``, a part of what pip calls ``library``, is unavailable: ``purpose``
    needs it."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs {library}, which is unavailable ({error}): pip install {library}"
        ) from error


def bar(items: Iterable = (), **settings: Any) -> Any:
    """tqdm's progress bar over ``items``, with its ``settings``; without tqdm a silent one."""
    tqdm = load("tqdm")
    return tqdm.tqdm(items, **settings) if tqdm else _Silent(items)


class _Silent:
    """As much of tqdm's progress bar as is used here, disabled."""

    disable = True

    def __init__(self, items: Iterable):
        self.items = items

    def __iter__(self) -> Iterator:
        return iter(self.items)

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def clear(self) -> None:
        pass
