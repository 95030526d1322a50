"""Command lines derived from settings classes: every field is a flag, with its default and help."""

import argparse
import contextlib
import importlib
import io
import shlex
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, NoReturn

from slimming.errors import UserError
from slimming.runtime import device
from slimming.settings import Dataclass, Spec, boolean, build, flag_names, kind_inside, name_flags


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, allows no abbreviations, and fails with one line.

    ``others`` are names of scripts with a ``make_parser()``: if an unknown flag belongs to one of
    them, the error says so. They are imported only in that case.
    """

    def __init__(self, description: str, others: tuple[str, ...] = ()):
        self.declared: list[argparse.Action] = []  # also those of groups
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.others = others
        self.kind: type[Dataclass] | None = None  # of the settings, if flags come from fields

    def error(self, message: str) -> NoReturn:
        raise UserError(self._of_others(sys.argv[1:]) or f"{message} (--help lists the flags)")

    def add_argument(self, *names: Any, **more: Any) -> argparse.Action:
        self.declared.append(super().add_argument(*names, **more))
        return self.declared[-1]

    def flags(self) -> set[str]:
        """Every flag, with its dashes."""
        return {name for action in self.declared for name in action.option_strings}

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


_script: type[Dataclass] | None = None  # the settings of the script that parsed its flags


def make_parser(description: str, kind: type[Dataclass], others: tuple[str, ...] = ()) -> Parser:
    """The parser of a script whose settings are a dataclass of this ``kind``. Nested settings
    become groups of flags, named by their ``title``. ``others``: see `Parser`."""
    parser = Parser(description, others)
    parser.kind = kind
    _add_fields(parser, parser, kind)
    return parser


def parse(parser: Parser, words: list[str] | None = None) -> dict[str, Any]:
    """The values on the command line by field name; fields that were not given are missing."""
    global _script
    _script = parser.kind
    typed = vars(parser.parse_args(words))
    device.use_threads(typed.get("threads"))
    return typed


def read(parser: Parser, words: list[str] | None = None) -> Any:
    """The settings of a script (an instance of `Parser.kind`) from its command line."""
    assert parser.kind is not None, "a parser of make_parser"
    return build(parser.kind, parse(parser, words))


def named(message: str) -> str:
    """``message`` with the flags of the running script for `arguments` of the library."""
    return name_flags(message, _script) if _script else message


def _add_fields(parser: Parser, group: Any, kind: type[Dataclass]) -> None:
    for entry in fields(kind):
        if inner := kind_inside(entry):
            title = getattr(inner, "title", None)
            _add_fields(parser, parser.add_argument_group(title) if title else parser, inner)
        elif "spec" in entry.metadata:
            action = _add_flag(group, entry, entry.metadata["spec"])
            if group is not parser:
                parser.declared.append(action)


def _add_flag(group: Any, entry: Field, spec: Spec) -> argparse.Action:
    text = spec.help.replace("%", "%%")
    default = entry.default
    if spec.kind in ("value", "positional") and default is not None and "(default" not in text:
        text += f" (default: {default})"
    more: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    if spec.kind == "positional":
        return group.add_argument(entry.name, nargs="?", metavar=spec.metavar, **more)
    if spec.kind == "value":
        more |= {"type": _checked(spec.parse), "choices": spec.choices, "metavar": spec.metavar}
        more |= {"action": _ByValue, "field_of": spec.field_of} if spec.field_of else {}
    elif spec.kind == "switch":
        more["action"] = "store_true"
    elif spec.kind == "on/off":
        more["action"] = argparse.BooleanOptionalAction
    elif spec.kind == "bool":
        more |= {"type": _checked(boolean), "nargs": "?", "const": True, "metavar": "True/False"}
    elif spec.kind == "list":
        more |= {"action": "append", "metavar": spec.metavar, "type": _checked(spec.parse)}
    return group.add_argument(*flag_names(entry, spec), dest=entry.name, **more)


class _ByValue(argparse.Action):
    """Store a value under the name of the field that ``field_of`` selects."""

    def __init__(self, *args: Any, field_of: Callable[[Any], str], **more: Any):
        super().__init__(*args, **more)
        self.field_of = field_of

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.field_of(value), value)


def _checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` for argparse, which shows the message of an ArgumentTypeError only."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read
