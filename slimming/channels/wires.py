"""Which BN decides what a layer of the paper's networks reads and writes, as a trace shows it."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from slimming.channels.groups import Found, sides_of, traced, with_selections
from slimming.channels.scaling import batch_norms, selections


class Wire(NamedTuple):
    """A convolution or linear layer, the BN whose channels it reads, and the BN directly behind it;
    None if there is no such BN."""

    layer: str
    reads: str | None
    writes: str | None


def wires(model: nn.Module) -> list[Wire]:
    """The layers of one of the paper's networks that read or write a BN, in the order of its
    modules. A BN before a channel selection is written by none."""
    found = Found(model, traced(model, torch.zeros(1, 3, 32, 32))[0])
    form = found.trace.model
    units, gated = sides_of(found), selections(form)
    norms = {name: units[name, "out"] for name in batch_norms(form) if name not in gated}
    gates = {name: units[name, "mask"] for name in gated}

    def reads(own: torch.Tensor) -> str | None:
        behind = (name for name, gate in gates.items() if torch.isin(own, gate).all())
        return next(behind, None) or writes(own)

    def writes(own: torch.Tensor) -> str | None:
        return next((name for name, norm in norms.items() if torch.equal(own, norm)), None)

    layers = [n for n, m in form.named_modules() if isinstance(m, (_ConvNd, nn.Linear))]
    every = [Wire(n, reads(units[n, "in"]), writes(units[n, "out"])) for n in layers]
    return [wire for wire in every if wire.reads or wire.writes]


def behind_selections(model: nn.Module) -> list[str]:
    """The layers that read through a channel selection."""
    gated = selections(with_selections(model))
    return [wire.layer for wire in wires(model) if wire.reads in gated] if gated else []
