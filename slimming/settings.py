"""Settings: frozen dataclasses whose fields document themselves.

A field has a default, a help text and a parser for its value. Command lines are derived from the
fields (`slimming.cli.flags`); programs fill them in like any dataclass.

>>> @dataclass(frozen=True)
... class Schedule:
...     epochs: int = setting(160, "epochs to train", parse=number(int, 1))
>>> Schedule(epochs=3)
Schedule(epochs=3)
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Protocol, TypeVar


class Dataclass(Protocol):
    """The argument of `dataclasses.fields`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Settings = TypeVar("Settings", bound=Dataclass)


@dataclass(frozen=True)
class Spec:
    """Metadata of a field besides its name, type and default.

    ``kind`` is how it is given on the command line: "value"; "switch", which is off unless given;
    "on/off", a switch that ``--no-...`` turns off again; "bool", a switch that also takes True or
    False; "list", which can be repeated; "positional". ``parse`` raises ValueError for an invalid
    value.
    """

    help: str
    flags: tuple[str, ...] = ()  # empty: --name-of-the-field
    kind: str = "value"
    metavar: str | None = None
    parse: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    kept: bool = False  # saved in checkpoints, for --resume
    field_of: Callable[[Any], str] | None = None  # the field that a value sets, if not this one


def part(kind: type[Dataclass]) -> Any:
    """A field that contains nested settings, with their defaults."""
    return field(default_factory=kind)


def setting(default: Any, help: str, *flags: str, **more: Any) -> Any:
    """A field of a settings class: its default and its `Spec`."""
    return field(default=default, metadata={"spec": Spec(help, flags, **more)})


def number(kind: type, low: float, high: float = math.inf, below: bool = False) -> Callable:
    """A parser of an int or float from ``low`` to ``high`` (exclusive with ``below``)."""
    form = "d" if kind is int else "g"
    limit = f" and {'less than' if below else 'at most'} {high:{form}}" if high < math.inf else ""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value < high if below or high == math.inf else low <= value <= high):
            noun = "an integer" if kind is int else "a number"
            raise ValueError(f"must be {noun} of at least {low:{form}}{limit}, not {text!r}")
        return value

    return parse


count = number(int, 1, 2**31 - 1)
count_from_zero = number(int, 0, 2**31 - 1)
seed = number(int, 0, 2**32, below=True)
fraction = number(float, 0, 1, below=True)
not_negative = number(float, 0)


def boolean(text: str) -> bool:
    """True or False, case-insensitive."""
    if text.lower() not in ("true", "false"):
        raise ValueError(f"must be True or False, not {text!r}")
    return text.lower() == "true"


def some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of one or more of the ``known`` names, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        names = text.split(",")
        if set(names) - set(known):
            known_names = ",".join(known)
            raise ValueError(f"must be one or more of {known_names}, not {text!r}")
        return tuple(dict.fromkeys(names))

    return parse


def plain_name(text: str) -> str:
    """A file name without a folder."""
    if not text or os.path.basename(text) != text or text in (".", ".."):
        raise ValueError(f"must be a file name without a folder, not {text!r}")
    return text


def specs(settings: Dataclass | type[Dataclass]) -> Iterator[tuple[Field, Spec]]:
    """Every field of a settings class or instance, including nested settings."""
    for entry in fields(settings):
        if inner := kind_inside(entry):
            yield from specs(inner)
        elif "spec" in entry.metadata:
            yield entry, entry.metadata["spec"]


def kind_inside(entry: Field) -> type[Dataclass] | None:
    """The class of the nested settings in a field; None if the field holds a value.

    Its default tells, because under ``from __future__ import annotations`` its type is a string.
    """
    made = entry.default_factory
    kinds = (made, type(entry.default), entry.type)
    return next((k for k in kinds if isinstance(k, type) and is_dataclass(k)), None)


def build(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Settings of this ``kind`` from ``values`` by field name; other fields take their defaults."""
    given: dict[str, Any] = {}
    for entry in fields(kind):
        if inner := kind_inside(entry):
            given[entry.name] = build(inner, values)
        elif entry.name in values:
            given[entry.name] = values[entry.name]
    return kind(**given)


def flat(settings: Dataclass) -> dict[str, Any]:
    """All values by field name, including those of nested settings."""
    values: dict[str, Any] = {}
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        values |= flat(value) if kind_inside(entry) else {entry.name: value}
    return values


def kept(settings: Dataclass) -> dict[str, Any]:
    """The values that a checkpoint saves for ``--resume``, by name."""
    names = {entry.name for entry, spec in specs(settings) if spec.kept}
    return {name: value for name, value in flat(settings).items() if name in names}


def name_flags(text: str, kind: type[Dataclass]) -> str:
    """``text`` for the user of a script whose settings are of this ``kind``: the library writes
    arguments as `argument`, a script calls them by their flags.

    >>> @dataclass(frozen=True)
    ... class Data:
    ...     image_size: int = setting(32, "height and width")
    >>> name_flags("omit `image_size`, or use another `model`", Data)
    'omit --image-size, or use another `model`'
    """
    flags = {entry.name: flag_names(entry, spec)[0] for entry, spec in specs(kind)}
    return re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), text)


def flag_names(entry: Field, spec: Spec) -> tuple[str, ...]:
    """The flags that set the field on a command line."""
    return spec.flags or (f"--{entry.name.replace('_', '-')}",)
