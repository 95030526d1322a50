"""The parser of a command line."""

import argparse
import contextlib
import importlib
import io
import shlex
import sys
from typing import NoReturn

from slimming.errors import UserError
from slimming.settings import Dataclass


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, allows no abbreviations, and fails with one line.

    ``others`` are names of scripts with a ``make_parser()``: if an unknown flag belongs to one of
    them, the error says so. They are imported only in that case.
    """

    def __init__(self, description: str, others: tuple[str, ...] = ()):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.others = others
        self.kind: type[Dataclass] | None = None  # of the settings, if flags come from fields

    def error(self, message: str) -> NoReturn:
        raise UserError(self._of_others(sys.argv[1:]) or f"{message} (--help lists the flags)")

    def flags(self) -> set[str]:
        """Every flag, with its dashes."""
        return {name for action in self._actions for name in action.option_strings}

    def accepts(self, words: list[str]) -> bool:
        """Whether the ``words`` of a command line can be parsed."""
        with contextlib.redirect_stdout(io.StringIO()):  # --help prints
            try:
                self.parse_args(words)
            except (SystemExit, UserError):
                return False
        return True

    def _of_others(self, words: list[str]) -> str | None:
        """An error message for flags of other scripts, which names these scripts and the commands
        to run; None if the unknown flags belong to no other script."""
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
