"""Remove the channels that no layer reads any more, where torch.fx can trace the network."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from slimming.channels.groups import copied
from slimming.channels.scaling import Masks, selections
from slimming.channels.widths import BATCH_NORMS, is_depthwise
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.slicing.slim import Kept, sliced


class _Tracer(fx.Tracer):
    """Treats channel selection as a leaf module, like the layers of PyTorch."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return hasattr(module, "indexes") or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of the operations of a network. UserError if torch.fx cannot trace it."""
    try:
        return _Tracer().trace(model)
    except Exception as error:  # whatever the user's forward does with a proxy
        raise_if_of_the_machine(error)
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"torch.fx cannot trace the network ({reason})") from error


THROUGH_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Dropout, nn.Identity),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)
THROUGH: set[Any] = {F.relu, F.relu6, F.hardswish, F.silu, F.dropout, torch.relu, "relu"}
THROUGH |= {F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d}
MEANS: set[Any] = {"mean", torch.mean}  # over height and width
FLATTENING: set[Any] = {torch.flatten, "flatten", "view", "reshape"}
SUMS: set[Callable] = {operator.add, operator.iadd, torch.add}


def without_unread_channels(model: nn.Module, size: int = 32) -> nn.Module:
    """``model`` without the channels that each later channel selection drops: a copy on the same
    device, in eval mode, whose outputs are equal; ``model`` itself if there are none.

    ``size``: height and width of its images. A network that torch.fx cannot trace stays as it is,
    and so do channels that go through operations other than the usual ones.
    """
    device = next(model.parameters()).device
    try:
        follow = _Follow(model)
        follow.run(torch.zeros(1, 3, size, size, device=device))
    except Exception as error:  # whatever the forward of a network of the user's own does
        raise_if_of_the_machine(error)
        return model
    kept = follow.kept()
    if not kept:
        return model
    small = sliced(model, kept)
    for norm, name in selections(small).items():
        selection = small.get_submodule(name)
        if norm in kept and isinstance(selection.indexes, nn.Parameter):
            left = selection.indexes.detach()[kept[norm]["out"]]
            selection.indexes = nn.Parameter(left, requires_grad=False)
    return small.eval().to(device)


class _Follow(fx.Interpreter):
    """Runs a network, and gives each channel of each result a unit: channels of one unit can only
    be removed together."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copied(model).eval()
        super().__init__(self.model, graph=trace(self.model))
        self.parents: list[int] = []
        self.needed: set[int] = set()
        self.units: dict[fx.Node, list[int]] = {}
        self.layers: list[tuple[str, nn.Module, list[int], list[int]]] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        known = [self.units[source] for source in n.all_input_nodes if source in self.units]
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            self.units[n] = self._units(n, value.shape[1], known)
        else:
            self._need(known)
        return value

    def kept(self) -> Kept:
        """What each layer keeps when only needed units stay, where that is less than all."""
        live = self._live()
        kept: Kept = {}
        for name, layer, reads, writes in self.layers:
            sides: Masks = {"out": live[self._roots(writes)]}
            if isinstance(layer, nn.Conv2d | nn.Linear) and not _passes(layer):
                sides["in"] = live[self._roots(reads)]
            sides = {side: mask for side, mask in sides.items() if not mask.all()}
            kept |= {name: sides} if sides else {}
        return kept

    def _units(self, node: fx.Node, channels: int, known: list[list[int]]) -> list[int]:
        layer = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, (nn.Conv2d, nn.Linear, *BATCH_NORMS)) and len(known) == 1:
            new = known[0] if _passes(layer) else self._new(channels)
            grouped = getattr(layer, "groups", 1) > 1 and not _passes(layer)
            if grouped or any(layer is other for _, other, _, _ in self.layers):  # it runs again
                self._need([known[0], new])
            self.layers.append((str(node.target), layer, known[0], new))
            return new
        indexes = getattr(layer, "indexes", None)
        if isinstance(indexes, torch.Tensor):
            return [unit for unit, keep in zip(known[0], indexes.tolist(), strict=True) if keep]
        if node.target is torch.cat and sum(map(len, known)) == channels:
            return [unit for units in known for unit in units]
        if node.target in SUMS and [len(units) for units in known] == [channels] * 2:
            self._couple(*known)
            return known[0]
        through = node.target in THROUGH or isinstance(layer, THROUGH_MODULES)
        through |= node.target in MEANS and node.args[1:2] in (((2, 3),), ([2, 3],))
        if through and [len(units) for units in known] == [channels]:
            return known[0]
        flat = node.target in FLATTENING or isinstance(layer, nn.Flatten)
        if flat and len(known) == 1 and channels % len(known[0]) == 0:
            return [unit for unit in known[0] for _ in range(channels // len(known[0]))]
        new = self._new(channels)
        self._need([*known, new])
        return new

    def _live(self) -> torch.Tensor:
        """Which units are needed: by the logits, or by a layer with a needed output."""
        live = torch.zeros(len(self.parents), dtype=torch.bool)
        live[self._roots(sorted(self.needed))] = True
        reading = [
            (_used(layer), self._roots(reads), self._roots(writes))
            for _, layer, reads, writes in self.layers
            if isinstance(layer, nn.Conv2d | nn.Linear) and not _passes(layer)
        ]
        before = -1
        while before < (before := int(live.sum())):
            for nonzero, reads, writes in reversed(reading):
                if nonzero.shape == (len(writes), len(reads)):
                    live[reads[nonzero[live[writes]].any(0)]] = True
                for units in (reads, writes):  # a layer keeps at least one channel
                    live[units[0]] |= not live[units].any()
        return live

    def _new(self, count: int) -> list[int]:
        first = len(self.parents)
        self.parents += range(first, first + count)
        return list(range(first, first + count))

    def _need(self, known: list[list[int]]) -> None:
        self.needed |= {unit for units in known for unit in units}

    def _couple(self, ours: list[int], theirs: list[int]) -> None:
        for one, other in zip(ours, theirs, strict=True):
            self.parents[self._root(other)] = self._root(one)

    def _root(self, unit: int) -> int:
        while self.parents[unit] != unit:
            unit = self.parents[unit]
        return unit

    def _roots(self, units: list[int]) -> torch.Tensor:
        return torch.tensor([self._root(unit) for unit in units], dtype=torch.long)


def _passes(layer: nn.Module) -> bool:
    """Whether each output channel of a layer depends on the input channel of the same index."""
    return is_depthwise(layer) if isinstance(layer, nn.Conv2d) else not isinstance(layer, nn.Linear)


def _used(layer: nn.Conv2d | nn.Linear) -> torch.Tensor:
    """(outputs, inputs of a group) bools: which weights are not zero."""
    nonzero = (layer.weight != 0).cpu()
    return nonzero.flatten(2).any(2) if nonzero.dim() > 2 else nonzero
