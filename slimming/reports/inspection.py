"""What can be pruned of a network, and what cannot: before anything is pruned."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from slimming.channels.groups import Channels, Group
from slimming.channels.inputs import Inputs
from slimming.measuring import figures
from slimming.slicing.slim import Kept, cuts, kept_channels

SHOWN = 3  # names in one line of the table


@dataclass(frozen=True)
class GroupRow:
    """Channels that go together: ``channels``, how many of them can be told apart; the layers that
    write and that read them; the fraction of the parameters and FLOPs of the whole network that
    goes with all but one of them."""

    name: str
    channels: int
    written_by: list[str]
    read_by: list[str]
    parameters: float
    flops: float


@dataclass(frozen=True)
class Inspection:
    """What can be pruned of a network: ``groups`` of coupled channels; ``pinned``: by the reason,
    the layers whose channels stay; ``unseen``: the layers that did not run. ``parameters`` and
    ``flops`` (for one sample) are those of the whole network, the fractions of them that are
    ``prunable`` those that go when each layer keeps one channel."""

    network: str
    groups: list[GroupRow]
    pinned: dict[str, list[str]]
    unseen: list[str]
    parameters: int
    flops: int
    prunable_parameters: float
    prunable_flops: float

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        table = [("group", "channels", "parameters", "FLOPs", "written by; read by")]
        for row in self.groups:
            layers = f"{_shown(row.written_by)}; {_shown(row.read_by)}"
            shares = (f"{row.parameters:.1%}", f"{row.flops:.1%}")
            table.append((row.name, str(row.channels), *shares, layers))
        first, *numbers = (max(map(len, column)) for column in list(zip(*table, strict=True))[:4])
        lines = [
            "  ".join([row[0].ljust(first), *map(str.rjust, row[1:4], numbers), row[4]]).rstrip()
            for row in table
        ]
        total = sum(row.channels for row in self.groups)
        lines += [
            "",
            f"{self.network}: {total:,} channels that can go, in {len(self.groups)} "
            f"group{'s' * (len(self.groups) != 1)}",
            f"with one left in each layer, {self.prunable_parameters:.1%} of {self.parameters:,} "
            f"parameters and {self.prunable_flops:.1%} of {self.flops:,} FLOPs go",
        ]
        for reason, names in self.pinned.items():
            lines.append(f"stays: {_shown(names)} ({reason})")
        if self.unseen:
            lines.append(f"did not run with these inputs: {_shown(self.unseen)}")
        return "\n".join(lines)


def _shown(names: list[str]) -> str:
    more = f" +{len(names) - SHOWN}" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "-") + more


def inspection(model: nn.Module, found: Channels, one: Inputs) -> Inspection:
    """The `Inspection` of a network of which these channels were ``found``; ``one``: one sample of
    its inputs."""
    flops, of_layer = figures.flops_with(model, one)
    parameters = figures.count_parameters(model)

    def gone(groups: Iterable[Group]) -> tuple[float, float]:
        """The fraction of the parameters and FLOPs that go with all but one channel of each."""
        kept = kept_channels(groups, {group.name: _fewest(group) for group in groups})
        left = _left(model, kept)
        fewer = sum(p.numel() * (1 - left[n]) for n, p in model.named_parameters() if n in left)
        saved = sum(f * (1 - left.get(f"{n}.weight", 1.0)) for n, f in of_layer.items())
        return fewer / max(1, parameters), saved / max(1, flops)

    rows = []
    for group in found.groups:
        sides = {"out": [m.layer for m in group.members if m.side != "in"]}
        sides["in"] = [m.layer for m in group.members if m.side == "in"]
        rows.append(GroupRow(group.name, group.size, sides["out"], sides["in"], *gone([group])))
    name = type(model).__name__
    return Inspection(
        name, rows, found.pinned, found.unseen, parameters, flops, *gone(found.groups)
    )


def _fewest(group: Group) -> torch.Tensor:
    """One unit of each layer of a group."""
    keep = torch.zeros(group.size, dtype=torch.bool)
    for member in group.members:
        own = member.units[group.alive[member.units]]
        if len(own) and not keep[own].any():
            keep[own[0]] = True
    return keep


def _left(model: nn.Module, kept: Kept) -> dict[str, float]:
    """The fraction of each parameter that is left, by its name, of those that lose some."""
    left = {}
    for name, dims in cuts(model, kept).items():
        left[name] = 1.0
        for mask in dims.values():
            left[name] *= float(mask.float().mean())
    return left
