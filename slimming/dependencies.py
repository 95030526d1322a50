"""Which channels of a network hang together: residual sums, concatenations, depthwise convolutions,
squeeze and excite, flatten before a linear layer.

Torch-Pruning's dependency graph works it out (Fang et al., CVPR 2023).
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from slimming.errors import UserError

CHANNELWISE = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.PReLU)
MIXING = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.MultiheadAttention)


@dataclass(frozen=True)
class Member:
    """A layer's share of a group: its channel ``channels[j]`` belongs to unit ``units[j]``."""

    layer: str
    side: str  # 'out' if the layer writes these channels, 'in' if it reads them
    channels: torch.Tensor
    units: torch.Tensor


@dataclass(frozen=True)
class Group:
    """Channels of one or more layers that only go together: ``size`` units, each of which can go.

    ``filters``: how many filters (rows of convolutions and linear layers) make up one unit.
    """

    name: str
    size: int
    members: list[Member] = field(repr=False)
    filters: int = 1


def groups(model: nn.Module, images: torch.Tensor, ignore: Iterable[str] = ()) -> list[Group]:
    """The channels of ``model`` that can be removed, as `Group`s in the order of the forward pass.

    Left out are the classifier, and every group with a layer called in ``ignore`` (its name or that
    of a module around it) among those that write it. UserError if a layer cannot be sliced exactly.
    """
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        if hasattr(module, "indexes"):
            raise UserError(f"{name} selects channels: resprune.py and denseprune.py slim those")
        if isinstance(module, MIXING):
            raise UserError(
                f"{name} ({type(module).__name__}) normalises over channels, so what is removed "
                "would change what stays: such a network cannot be slimmed exactly"
            )
    missing = [word for word in ignore if not any(_inside(name, word) for name in names.values())]
    if missing:
        raise UserError(f"the network has no layer called {', '.join(missing)}")
    graph = _dependencies(model, images)
    found = [_group(graph, raw, names) for raw in graph.get_all_groups()]
    return [
        group
        for group in found
        if any(member.side == "in" for member in group.members)  # else it writes the logits
        and not any(
            member.side == "out" and _inside(member.layer, word)
            for member in group.members
            for word in ignore
        )
    ]


def count_filters(found: list[Group]) -> int:
    """Filters that can be removed."""
    return sum(group.size * group.filters for group in found)


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Whether each filter reads the one channel of its own."""
    return layer.groups == layer.in_channels == layer.out_channels and layer.groups > 1


def _inside(name: str, word: str) -> bool:
    return name == word or name.startswith(f"{word}.")


def _dependencies(model: nn.Module, images: torch.Tensor):
    """Torch-Pruning's graph of ``model``, traced with one image."""
    import torch_pruning

    device = next(model.parameters()).device
    image = images[:1].to(device, torch.float32)
    training = model.training
    try:
        with (
            torch.enable_grad(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            return torch_pruning.DependencyGraph().build_dependency(model, image, verbose=False)
    except Exception as error:  # the library raises as many kinds as there are networks
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"Torch-Pruning cannot trace the channels of {type(model).__name__} ({reason}): it may "
            "cut or shuffle channels, which cannot be slimmed exactly"
        ) from error
    finally:
        model.train(training)


def _group(graph, raw, names: dict[nn.Module, str]) -> Group:
    """One of the library's groups, with names for modules and tensors for lists."""
    parts, repeats = [], 1
    for item in raw:
        layer = item.dep.target.module
        if layer not in names:
            if isinstance(layer, nn.Parameter):
                name = graph._param_to_name.get(layer, "a parameter")
                raise UserError(f"{name} is a parameter without a layer: it cannot be sliced")
            continue  # the library's own nodes: sums, concatenations, views
        if not isinstance(layer, (nn.Conv2d, nn.Linear, *CHANNELWISE)):
            raise UserError(f"{names[layer]} ({type(layer).__name__}) cannot be sliced")
        side = "out" if _writes(graph, item.dep) else "in"
        if isinstance(layer, nn.Conv2d) and not is_depthwise(layer):
            repeats = math.lcm(repeats, layer.groups)
        parts.append((names[layer], side, item.idxs, item.root_idxs, layer))
    channels = len(raw[0].idxs)
    size = channels // repeats if channels % repeats == 0 else 1  # a grouped convolution loses the
    members, filters = [], 0  # same places of each of its groups: they go together
    for name, side, indices, roots, layer in parts:
        units = torch.tensor(roots) % size
        members.append(Member(name, side, torch.tensor(indices), units))
        filters += repeats if side == "out" and isinstance(layer, (nn.Conv2d, nn.Linear)) else 0
    return Group(members[0].layer, size, members, filters)


def _writes(graph, dependency) -> bool:
    return graph.is_out_channel_pruning_fn(dependency.handler)
