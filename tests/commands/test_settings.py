"""Settings: nested parts are found whatever way their class writes its annotations."""

from __future__ import annotations

from dataclasses import dataclass, field

from slimming.cli import flags
from slimming.settings import build, flat, kept, part, setting


@dataclass(frozen=True)
class Train:
    epochs: int = setting(1, "number of epochs", parse=int, kept=True)


@dataclass(frozen=True)
class Nested:
    train: Train = part(Train)
    name: str = setting("", "a value beside it")


@dataclass(frozen=True)
class ByHand:
    nested: Nested = field(default_factory=Nested)
    given: Nested = Nested(Train(2))


def test_a_nested_part_is_found_though_its_annotation_is_a_string():
    assert build(Nested, {"epochs": 7}) == Nested(Train(7))
    assert build(ByHand, {"epochs": 7}).nested.train.epochs == 7
    assert build(ByHand, {"epochs": 7}).given.train.epochs == 7
    assert flat(Nested(Train(7))) == {"epochs": 7, "name": ""}
    assert kept(Nested(Train(7))) == {"epochs": 7}
    assert flags.parse(flags.make_parser("", Nested), ["--epochs", "7"]) == {"epochs": 7}
