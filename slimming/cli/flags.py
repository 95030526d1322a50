"""Command lines derived from settings classes: every field is a flag, with its default and help."""

import argparse
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

from slimming.cli.parser import Parser
from slimming.runtime import threads
from slimming.settings import Dataclass, Spec, boolean, flag_names, kind_inside, name_flags

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
    threads.use(typed.get("threads"))
    return typed


def named(message: str) -> str:
    """``message`` with the flags of the running script for `arguments` of the library."""
    return name_flags(message, _script) if _script else message


def _add_fields(parser: Parser, group: Any, kind: type[Dataclass]) -> None:
    for entry in fields(kind):
        if inner := kind_inside(entry):
            title = getattr(inner, "title", None)
            _add_fields(parser, parser.add_argument_group(title) if title else parser, inner)
        elif "spec" in entry.metadata:
            _add_flag(group, entry, entry.metadata["spec"])


def _add_flag(group: Any, entry: Field, spec: Spec) -> None:
    text = spec.help.replace("%", "%%")
    default = entry.default
    if spec.kind in ("value", "positional") and default is not None and "(default" not in text:
        text += f" (default: {default})"
    more: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    if spec.kind == "positional":
        group.add_argument(entry.name, nargs="?", metavar=spec.metavar, **more)
        return
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
    group.add_argument(*flag_names(entry, spec), dest=entry.name, **more)


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
