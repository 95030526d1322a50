"""A parser that checks what is typed."""

import argparse
import contextlib
import importlib
import io
import math
import os
import re
import shlex
import sys
from collections.abc import Callable

from models import NETWORKS, constructor
from slimming.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, allows no abbreviations, and fails in one line.

    Flags that it does not have may be those of ``others``, names of scripts with a
    ``make_parser()``: then that line says so. They are imported only for it.
    """

    def __init__(self, description: str, others: tuple[str, ...] = ()):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.others = others

    def error(self, message: str):
        raise UserError(self._of_others(sys.argv[1:]) or f"{message} (--help lists the flags)")

    def flags(self) -> set[str]:
        """Every flag as it is typed."""
        return {name for action in self._actions for name in action.option_strings}

    def accepts(self, words: list[str]) -> bool:
        """Whether the ``words`` of a command line can be parsed."""
        with contextlib.redirect_stdout(io.StringIO()):  # of --help
            try:
                self.parse_args(words)
            except (SystemExit, UserError):
                return False
        return True

    def _of_others(self, words: list[str]) -> str | None:
        """Which other script takes those flags among ``words`` that this one does not have, and
        what to type; None if there is no such script."""
        typed = dict.fromkeys(w.partition("=")[0] for w in words if w.startswith("--"))
        foreign = [name for name in typed if name not in self.flags()]
        if not foreign:
            return None
        parsers = {name: importlib.import_module(name).make_parser() for name in self.others}
        takers = [name for name, parser in parsers.items() if parser.flags().issuperset(foreign)]
        takers = [name for name in takers if parsers[name].accepts(words)] or takers
        if not takers:
            return None
        scripts = " and of ".join(f"{name}.py" for name in takers)
        commands = ", or ".join(shlex.join(["python", f"{name}.py", *words]) for name in takers)
        are = "are flags" if len(foreign) > 1 else "is a flag"
        return f"{', '.join(foreign)} {are} of {scripts}: {commands}"


def number(kind: type, low: float, high: float = math.inf, below: bool = False) -> Callable:
    """An argparse type: an int or float from ``low`` to ``high`` (less than it with ``below``)."""
    limit = f" and {'less than' if below else 'at most'} {high:g}" if high < math.inf else ""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value < high if below or high == math.inf else low <= value <= high):
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"must be {noun} of at least {low:g}{limit}, not {text!r}"
            )
        return value

    return parse


def architecture(text: str) -> str:
    """An argparse type: the name of a network of this suite or of torchvision, or
    preact_res<depth>."""
    if not re.fullmatch(r"preact_res\d{1,4}", text) and constructor(text) is None:
        raise argparse.ArgumentTypeError(
            f"no network is called {text!r}: use {', '.join(NETWORKS)}, preact_res<depth>, or the "
            "name of a classification model of torchvision"
        )
    return text


def plain_name(text: str) -> str:
    """An argparse type: a file name without folders."""
    if not text or os.path.basename(text) != text or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"must be a name without folders, not {text!r}")
    return text
