"""Trace the coupled channels of a network without ``wiring()``: residual sums, concatenations,
depthwise convolutions, squeeze and excite, flatten before a linear layer.

Uses the dependency graph of Torch-Pruning (Fang et al., CVPR 2023).
"""

import contextlib
import copy
import io
import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from slimming.errors import UserError
from slimming.pruning.coupling import Group, Member, inside, is_wired
from slimming.pruning.widths import LAYERS, is_depthwise, width
from slimming.runtime import optional
from slimming.runtime.failures import raise_if_of_the_machine

if TYPE_CHECKING:
    from torch_pruning import Dependency, DependencyGraph
    from torch_pruning import Group as RawGroup

MIXING = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.MultiheadAttention)


def need_library(network: object) -> None:
    """UserError if Torch-Pruning is unavailable and ``network``, a module or its class, needs it
    because it has no ``wiring()``."""
    if not is_wired(network):
        optional.need("torch_pruning", "torch-pruning", "finding the coupled channels of a network")


def traced(model: nn.Module, images: torch.Tensor, ignore: Iterable[str] = ()) -> list[Group]:
    """The groups of any network that can be traced, each with the name of its first layer.

    `slimming.pruning.groups.groups` calls this for networks without ``wiring()``.
    """
    copied = copy.deepcopy(model).cpu().float().requires_grad_()  # the library follows gradients
    names = {module: name for name, module in copied.named_modules()}
    for module, name in names.items():
        if hasattr(module, "indexes"):
            raise UserError(
                f"{name} selects channels, which cannot be traced: add a wiring() method that "
                "declares which layer reads and writes which BatchNorm, as in models.resnet"
            )
        if isinstance(module, MIXING):
            raise UserError(
                f"{name} ({type(module).__name__}) normalises over channels, so removing some "
                "changes the others: such a network cannot be slimmed exactly"
            )
    graph = _dependencies(copied, images)
    if unseen := _only_in_training(copied, images):
        raise UserError(
            f"{', '.join(unseen)} run only in training mode, so they cannot be traced: disable "
            "them (for example with aux_logits=False), or remove them before pruning"
        )
    raw = [group for group in graph.get_all_groups() if _is_prunable(graph, group, names, ignore)]
    order = {name: place for place, name in enumerate(names.values())}
    coupled = [_group(graph, group, names) for group in raw]
    return sorted(coupled, key=lambda group: min(order[member.layer] for member in group.members))


def _dependencies(model: nn.Module, images: torch.Tensor) -> "DependencyGraph":
    """Torch-Pruning's graph of ``model``, traced with one image."""
    need_library(model)
    import torch_pruning

    image = images[:1].cpu().float()
    try:
        with (
            torch.enable_grad(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            return torch_pruning.DependencyGraph().build_dependency(model, image, verbose=False)
    except Exception as error:  # whatever the library, or the user's forward in it, raises
        raise_if_of_the_machine(error)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"Torch-Pruning cannot trace the channels of {type(model).__name__} ({reason}): if it "
            "splits or shuffles channels, it cannot be slimmed exactly"
        ) from error


@torch.no_grad()
def _only_in_training(model: nn.Module, images: torch.Tensor) -> list[str]:
    """The layers of ``model`` that run in training mode but not in eval mode."""
    copied = copy.deepcopy(model)
    ran: dict[bool, set[str]] = {True: set(), False: set()}
    for name, layer in copied.named_modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_hook(lambda *_, name=name: ran[copied.training].add(name))
    try:
        with torch.random.fork_rng(devices=[]):
            for mode in (False, True):
                copied.train(mode)(images[:1].repeat(2, 1, 1, 1).cpu().float())
    except Exception as error:  # of the user's forward: the layers that ran before it count
        raise_if_of_the_machine(error)
    return sorted(ran[True] - ran[False])


def _is_prunable(
    graph: "DependencyGraph", raw: "RawGroup", names: dict[nn.Module, str], ignore: Iterable[str]
) -> bool:
    """Whether a group of the library can be pruned: it does not contain the logits, and no layer in
    ``ignore`` writes it."""
    if any(item.dep.target.type.name == "OUTPUT" for item in raw):
        return False
    layers = [item.dep for item in raw if item.dep.target.module in names]
    writers = [names[dep.target.module] for dep in layers if _writes(graph, dep)]
    return len(writers) < len(layers) and not any(
        inside(writer, word) for writer in writers for word in ignore
    )


def _group(graph: "DependencyGraph", raw: "RawGroup", names: dict[nn.Module, str]) -> Group:
    """Convert a group of the library: modules to names, lists to tensors."""
    parts, repeats = [], 1
    for item in raw:
        layer = item.dep.target.module
        if not _has_channels(graph, layer, names):
            continue
        side = "out" if _writes(graph, item.dep) else "in"
        if max(item.idxs) >= width(layer, side):
            raise UserError(
                f"{names[layer]} has fewer channels than {names[raw[0].dep.target.module]} passes "
                "to it: an operation between them splits or shuffles channels, which cannot be "
                "slimmed exactly"
            )
        if isinstance(layer, nn.Conv2d) and not is_depthwise(layer):
            repeats = math.lcm(repeats, layer.groups)
        parts.append((layer, side, item.idxs, item.root_idxs))
    channels = len(raw[0].idxs)
    # a grouped convolution loses the same positions of each of its groups: these are coupled
    size = channels // repeats if channels % repeats == 0 else 1
    members = []
    filters = torch.zeros(size, dtype=torch.long)
    for layer, side, indices, roots in parts:
        units = torch.tensor(roots) % size
        members.append(Member(names[layer], side, torch.tensor(indices), units))
        if side == "out" and isinstance(layer, (nn.Conv2d, nn.Linear)):
            filters += torch.bincount(units, minlength=size)
    return Group(members[0].layer, members, filters, torch.ones(size, dtype=torch.bool))


def _has_channels(graph: "DependencyGraph", layer: nn.Module, names: dict[nn.Module, str]) -> bool:
    """Whether a node of the library can be sliced; UserError if it would have to be but cannot."""
    if layer not in names:
        if isinstance(layer, nn.Parameter):
            name = graph._param_to_name.get(layer, "a parameter")
            raise UserError(
                f"{name} is a parameter outside of any layer and cannot be sliced: put it in a "
                "layer, or ignore the layers that write to it"
            )
        return False  # the library's own nodes: sums, concatenations, views
    if not isinstance(layer, LAYERS):
        raise UserError(
            f"{names[layer]} ({type(layer).__name__}) cannot be sliced, only "
            f"{', '.join(kind.__name__ for kind in LAYERS)} can: ignore the layers that write to it"
        )
    return not (isinstance(layer, nn.PReLU) and layer.num_parameters == 1)  # one shared slope


def _writes(graph: "DependencyGraph", dependency: "Dependency") -> bool:
    return graph.is_out_channel_pruning_fn(dependency.handler)
