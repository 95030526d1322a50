"""What a group of coupled channels is, whoever finds it, and what networks declare of theirs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Wire(Protocol):
    """A layer, and the BNs that decide which of its channels stay: see `models.Wire`."""

    @property
    def layer(self) -> str: ...
    @property
    def reads(self) -> str | None: ...
    @property
    def writes(self) -> str | None: ...


class Wired(Protocol):
    """A network that declares which of its channels are coupled."""

    cfg: list | dict

    def wiring(self) -> Sequence[Wire]:
        """Every layer that reads or writes a BN."""


def is_wired(network: object) -> "TypeIs[Wired]":
    """Whether a module, or its class, has a ``wiring()``."""
    return hasattr(network, "wiring")


@dataclass(frozen=True)
class Member:
    """A layer's share of a group: its channel ``channels[j]`` belongs to unit ``units[j]``."""

    layer: str
    side: str  # 'out': it writes these channels, 'in': it reads them, 'mask': see `Group`
    channels: torch.Tensor
    units: torch.Tensor


@dataclass(frozen=True)
class Group:
    """Channels of one or more layers that are removed together or not at all: the units.

    Layers that write a unit (side 'out') lose their filter for it, layers that read it ('in') their
    slice of every filter. A BN with a channel selection behind it ('mask') stays whole, as does
    what writes to it: its selection drops the unit.

    ``filters`` (size,) int: how many rows of convolutions and linear layers each unit is; 1 where
    no layer writes it. ``alive`` (size,) bool: where a selection has not dropped the unit already;
    one that it has dropped counts 0 filters and does not come back.
    """

    name: str
    members: list[Member] = field(repr=False)
    filters: torch.Tensor = field(repr=False)
    alive: torch.Tensor = field(repr=False)

    @property
    def size(self) -> int:
        """How many units there are."""
        return len(self.filters)


def count_filters(coupled: Iterable[Group]) -> int:
    """Filters that can be removed."""
    return sum(int(group.filters.sum()) for group in coupled)


def inside(name: str, word: str) -> bool:
    """Whether a layer is called ``word`` or stands in a module of that name."""
    return name == word or name.startswith(f"{word}.")
