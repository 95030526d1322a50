"""Other libraries on the networks of benchmarks/zoo.py; what they return is compared with the dense
network that lacks the same channels."""

from collections.abc import Callable

import torch
from torch import nn

from slimming.channels.groups import channels, copied
from slimming.channels.inputs import Inputs
from slimming.channels.kinds import Convolution
from slimming.channels.labels import OUTPUT

WEIGHTED = Convolution | nn.Linear
SHARE = 1 / 3  # of the channels of each group


def by_torch_pruning(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Torch-Pruning, told to leave the layers that write the outputs."""
    import torch_pruning

    last = channels(model, inputs).pinned.get(OUTPUT, [])
    model.train(False)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs if isinstance(inputs, torch.Tensor) else list(inputs),
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=SHARE,
        ignored_layers=[model.get_submodule(name) for name in last],
    )
    pruner.step()
    return model


def by_kirigami(model: nn.Module, inputs: Inputs) -> nn.Module:
    """torch-kirigami, with the largest budget of 40, 20 and 5 % of the parameters that it finds a
    plan for."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Greedy, GroupMagnitude, ParameterBudget, Pruner
    from torch_kirigami.pruning.types import PlanningError

    model.train(False)
    arguments = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    graph = DependencyGraph.build(model, args=arguments)
    pruner = Pruner(model, graph=graph)
    candidates = pruner.discover_candidates()
    for share in (0.4, 0.2, 0.05):
        budget = ParameterBudget.from_ratio(model, share)
        try:
            return pruner.prune(candidates, budget=budget, strategy=Greedy(GroupMagnitude(p=1)))[0]
        except PlanningError:
            if share == 0.05:
                raise
    raise AssertionError("unreachable")


PEERS: dict[str, Callable[[nn.Module, Inputs], nn.Module]] = {
    "torch-pruning": by_torch_pruning,
    "torch-kirigami": by_kirigami,
}


@torch.no_grad()
def without(dense: nn.Module, slim: nn.Module) -> nn.Module:
    """The dense network in which no layer reads what the layers of ``slim`` do not read any more:
    its random weights, which ``slim`` still has, tell which."""
    zeroed = copied(dense)
    layers = dict(slim.named_modules())
    for name, layer in zeroed.named_modules():
        left = layers.get(name)
        if not isinstance(layer, WEIGHTED) or not isinstance(left, WEIGHTED):
            continue
        if left.weight.shape != layer.weight.shape:
            read = _channels(layer, layer.weight.shape)
            found = torch.bincount(read[_places(layer.weight, left.weight)])
            stays = (
                (2 * found >= found.max()).nonzero().flatten()
            )  # equal values are found by chance
            layer.weight.mul_(torch.isin(read, stays).view(layer.weight.shape))
    return zeroed


def _places(dense: torch.Tensor, slim: torch.Tensor) -> torch.Tensor:
    """The places of the values of ``slim`` in ``dense``, flat."""
    values, order = dense.flatten().sort()
    found = torch.searchsorted(values, slim.flatten().contiguous()).clamp(max=len(values) - 1)
    return order[found[values[found] == slim.flatten()]]


def _channels(layer: Convolution | nn.Linear, shape: torch.Size) -> torch.Tensor:
    """The input channel that each weight reads, flat."""
    groups = layer.groups if isinstance(layer, Convolution) else 1
    if isinstance(layer, Convolution) and layer.transposed:
        rows = torch.arange(shape[0])
        return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).flatten()
    of_filter = torch.arange(shape[0]) // (shape[0] // groups) * shape[1]
    own = of_filter[:, None] + torch.arange(shape[1])
    return own.view(*shape[:2], *[1] * (len(shape) - 2)).expand(shape).flatten()
