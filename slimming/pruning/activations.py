"""The inputs and outputs of all layers of a network for many images, one layer at a time."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from slimming.channels.widths import BATCH_NORMS
from slimming.errors import UserError, raise_if_of_the_machine

LEAST = 32  # images
BATCH = 128
MEMORY = 3 * 2**30  # bytes of activations that are kept at a time: large images are fewer

# Operations that are recomputed, because that costs less than storing their outputs.
CHEAP_MODULES = (*BATCH_NORMS, nn.Dropout, nn.Identity, nn.Flatten)
CHEAP_FUNCTIONS = {F.relu, F.relu6, F.hardswish, F.silu, F.dropout, torch.relu, torch.flatten}
CHEAP_FUNCTIONS |= {operator.getitem, getattr}
CHEAP_METHODS = {"relu", "flatten", "view", "reshape", "size", "contiguous"}
IN_PLACE: dict[Callable, Callable] = {operator.iadd: operator.add, operator.imul: operator.mul}


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


class Activations:
    """The activations of a network for ``batches`` of images (N, 3, H, W), one operation at a time.

    Runs a copy of ``model`` in eval mode, without in-place operations. ``order`` lists the
    operations of the forward pass; of two branches that meet, the one with fewer layers comes
    first. `compute` runs one operation for all batches and frees the outputs that no later
    operation reads, so that only the activations between two layers are stored. UserError if
    torch.fx cannot trace the network.
    """

    def __init__(self, model: nn.Module, batches: list[torch.Tensor]):
        self.model = _nothing_in_place(copy.deepcopy(model).eval())
        self.batches = batches
        graph = trace(self.model)
        self.order = _sorted(graph)
        self.nodes = {node.name: node for node in self.order}
        self.kept: dict[fx.Node, list[torch.Tensor | None]] = {}
        self.waiting = {node: self._readers(node) for node in self.order if not self.is_cheap(node)}

    def module(self, node: fx.Node) -> nn.Module | None:
        """The layer that an operation calls, if it calls one."""
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def value(self, node: fx.Node, batch: int) -> Any:
        """The output of an operation for the batch with index ``batch``."""
        if node in self.kept:
            return self.kept[node][batch]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.value(n, batch))
        if node.op == "placeholder":
            return self.batches[batch]
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.model)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target))(*args, **kwargs)
        assert callable(node.target)  # "call_function"
        if "inplace" in kwargs:
            kwargs = {**kwargs, "inplace": False}
        return IN_PLACE.get(node.target, node.target)(*args, **kwargs)

    def compute(self, node: fx.Node) -> None:
        """Run an operation for all batches and store its outputs, unless it is cheap."""
        if node not in self.waiting:
            return
        sources = self._sources(node)
        for source in sources:
            self.waiting[source].discard(node)
        outputs = []
        for batch in range(len(self.batches)):
            outputs.append(self.value(node, batch))
            for source in sources:
                if not self.waiting[source]:
                    self.kept[source][batch] = None
        self.kept[node] = outputs
        for source in sources:
            if not self.waiting[source]:
                del self.kept[source]

    def peak(self) -> int:
        """The peak number of bytes of stored activations; runs all operations."""
        most = 0
        for node in self.order:
            self.compute(node)
            values = [v for outputs in self.kept.values() for v in outputs]
            most = max(most, sum(v.nbytes for v in values if isinstance(v, torch.Tensor)))
        return most

    def is_known(self, node: fx.Node) -> bool:
        """Whether all stored outputs that `value` needs for an operation are available."""
        return node in self.kept or (self.is_cheap(node) and self._sources(node) <= set(self.kept))

    def is_cheap(self, node: fx.Node) -> bool:
        """Whether the output of an operation is recomputed each time instead of stored."""
        if node.op == "call_module":
            module = self.module(node)
            activation = type(module).__module__ == "torch.nn.modules.activation"
            return activation or hasattr(module, "indexes") or isinstance(module, CHEAP_MODULES)
        targets: dict[str, set] = {"call_function": CHEAP_FUNCTIONS, "call_method": CHEAP_METHODS}
        return node.op not in targets or node.target in targets[node.op]

    def _sources(self, node: fx.Node) -> set[fx.Node]:
        """The stored operations that one reads, directly or through cheap ones."""
        return self._nearest(node, lambda n: n.all_input_nodes)

    def _readers(self, node: fx.Node) -> set[fx.Node]:
        """The stored operations that read this one, directly or through cheap ones."""
        return self._nearest(node, lambda n: n.users)

    def _nearest(self, node: fx.Node, beside: Callable) -> set[fx.Node]:
        nearest, left = set(), list(beside(node))
        while left:
            other = left.pop()
            if self.is_cheap(other):
                left += beside(other)
            else:
                nearest.add(other)
        return nearest


def count_within(memory: int, image: torch.Tensor, *models: nn.Module) -> int:
    """The number of images of the size of ``image`` (1, 3, H, W) for which the activations that
    `Activations` stores at a time, summed over all ``models``, fit in ``memory`` bytes."""
    return memory // sum(Activations(model, [image]).peak() for model in models)


def _nothing_in_place(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]  # a bool, in no stub of Module
    return model


def _sorted(graph: fx.Graph) -> list[fx.Node]:
    """The operations that the output depends on, in topological order, shorter branches first."""
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        longest = max((depth[n] for n in node.all_input_nodes), default=0)
        depth[node] = longest + (node.op == "call_module" and bool(node.all_input_nodes))
    (output,) = (node for node in graph.nodes if node.op == "output")
    order: dict[fx.Node, None] = {}
    left = list(output.all_input_nodes)
    while left:
        node = left[-1]
        missing = [n for n in node.all_input_nodes if n not in order]
        if missing:
            left.append(min(missing, key=depth.__getitem__))
        else:
            left.pop()
            order.setdefault(node)
    return list(order)
