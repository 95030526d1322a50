"""Groups of coupled channels, and how networks declare theirs."""

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
    """The channels of a layer in a group: channel ``channels[j]`` belongs to unit ``units[j]``."""

    layer: str
    side: str  # 'out': it writes these channels, 'in': it reads them, 'mask': see `Group`
    channels: torch.Tensor
    units: torch.Tensor


@dataclass(frozen=True)
class Group:
    """Units of coupled channels: the channels of a unit are removed together, in all its layers.

    Layers that write a unit (side 'out') lose their filter for it, layers that read it ('in') lose
    its slice of every filter. A BN before a channel selection ('mask') keeps its width, as do the
    layers that write to it: the selection drops the unit.

    ``filters`` (size,) int: the number of rows of convolutions and linear layers in each unit; 1 if
    no layer writes it. ``alive`` (size,) bool: False if a selection has dropped the unit already;
    such a unit counts 0 filters and stays dropped.
    """

    name: str
    members: list[Member] = field(repr=False)
    filters: torch.Tensor = field(repr=False)
    alive: torch.Tensor = field(repr=False)

    @property
    def size(self) -> int:
        """The number of units."""
        return len(self.filters)


def count_filters(coupled: Iterable[Group]) -> int:
    """The number of filters that can be removed."""
    return sum(int(group.filters.sum()) for group in coupled)


def inside(name: str, word: str) -> bool:
    """Whether the layer ``name`` is ``word`` or is inside a module of that name."""
    return name == word or name.startswith(f"{word}.")
