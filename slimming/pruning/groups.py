"""Which channels of a network hang together: residual sums, concatenations, depthwise convolutions,
squeeze and excite, flatten before a linear layer.

Torch-Pruning's dependency graph works it out (Fang et al., CVPR 2023).
"""

import contextlib
import copy
import io
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from models.resize import LAYERS, is_depthwise, widths
from slimming.errors import UserError
from slimming.runtime import optional

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

    ``filters`` (size,): how many filters, rows of convolutions and linear layers, each unit is.
    """

    name: str
    size: int
    members: list[Member] = field(repr=False)
    filters: torch.Tensor = field(repr=False)


def groups(model: nn.Module, images: torch.Tensor, ignore: Iterable[str] = ()) -> list[Group]:
    """The channels of ``model`` that can be removed, as `Group`s in the order of the forward pass.

    Left out are the classifier, and every group with a layer called in ``ignore`` (its name or that
    of a module around it) among those that write it. UserError if a layer cannot be sliced exactly.
    """
    if not isinstance(images, torch.Tensor):
        raise UserError("images must be one tensor (N, 3, H, W), all that the network reads")
    traced = copy.deepcopy(model).cpu().float().requires_grad_()  # the library follows gradients
    names = {module: name for name, module in traced.named_modules()}
    for module, name in names.items():
        if hasattr(module, "indexes"):
            raise UserError(f"{name} selects channels: resprune.py and denseprune.py slim those")
        if isinstance(module, MIXING):
            raise UserError(
                f"{name} ({type(module).__name__}) normalises over channels, so what is removed "
                "would change what stays: such a network cannot be slimmed exactly"
            )
    check_names(traced, ignore)
    graph = _dependencies(traced, images)
    if unseen := _only_in_training(traced, images):
        raise UserError(
            f"{', '.join(unseen)} run in training alone, so what they read cannot be followed: "
            "turn them off (aux_logits=False, say) or prune without them"
        )
    raw = [group for group in graph.get_all_groups() if _may_go(graph, group, names, ignore)]
    order = {name: place for place, name in enumerate(names.values())}
    found = [_group(graph, group, names) for group in raw]
    return sorted(found, key=lambda group: min(order[member.layer] for member in group.members))


def need_library() -> None:
    """UserError if Torch-Pruning is unavailable."""
    optional.need("torch_pruning", "torch-pruning", "finding the coupled channels of a network")


def check_names(model: nn.Module, ignore: Iterable[str]) -> None:
    """UserError if no module of ``model`` is called as one of ``ignore``."""
    names = [name for name, _ in model.named_modules()]
    missing = [word for word in ignore if not any(inside(name, word) for name in names)]
    if missing:
        raise UserError(f"the network has no layer called {', '.join(missing)}")


def count_filters(found: list[Group]) -> int:
    """Filters that can be removed."""
    return sum(int(group.filters.sum()) for group in found)


def width(layer: nn.Module, side: str) -> int:
    """How many channels a layer writes ('out') or reads ('in')."""
    shape = widths(layer)[""]
    return shape[-1] if side == "out" else shape[0]


def inside(name: str, word: str) -> bool:
    """Whether a layer is called ``word`` or stands in a module of that name."""
    return name == word or name.startswith(f"{word}.")


def _dependencies(model: nn.Module, images: torch.Tensor):
    """Torch-Pruning's graph of ``model``, traced with one image."""
    need_library()
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
    except Exception as error:  # the library raises as many kinds as there are networks
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"Torch-Pruning cannot trace the channels of {type(model).__name__} ({reason}): it may "
            "cut or shuffle channels, which cannot be slimmed exactly"
        ) from error


@torch.no_grad()
def _only_in_training(model: nn.Module, images: torch.Tensor) -> list[str]:
    """The layers of a copy of ``model`` that run in training mode and not in eval mode."""
    copied, ran = copy.deepcopy(model), {True: set(), False: set()}
    for name, layer in copied.named_modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_hook(lambda *_, name=name: ran[copied.training].add(name))
    with torch.random.fork_rng(devices=[]), contextlib.suppress(Exception):
        for mode in (False, True):
            copied.train(mode)(images[:1].repeat(2, 1, 1, 1).cpu().float())
    return sorted(ran[True] - ran[False])


def _may_go(graph, raw, names: dict[nn.Module, str], ignore: Iterable[str]) -> bool:
    """Whether a group of the library neither is the logits nor is written by what to ``ignore``."""
    if any(item.dep.target.type.name == "OUTPUT" for item in raw):
        return False
    layers = [item.dep for item in raw if item.dep.target.module in names]
    writers = [names[dep.target.module] for dep in layers if _writes(graph, dep)]
    return len(writers) < len(layers) and not any(
        inside(writer, word) for writer in writers for word in ignore
    )


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
        if not isinstance(layer, LAYERS):
            raise UserError(
                f"{names[layer]} ({type(layer).__name__}) is none of the layers that can be sliced "
                f"({', '.join(kind.__name__ for kind in LAYERS)}): leave alone what writes to it"
            )
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            continue  # one slope for all channels
        side = "out" if _writes(graph, item.dep) else "in"
        if max(item.idxs) >= width(layer, side):
            raise UserError(
                f"{names[layer]} has fewer channels than {names[raw[0].dep.target.module]} gives "
                "it: something between them cuts or shuffles channels"
            )
        if isinstance(layer, nn.Conv2d) and not is_depthwise(layer):
            repeats = math.lcm(repeats, layer.groups)
        parts.append((names[layer], side, item.idxs, item.root_idxs, layer))
    channels = len(raw[0].idxs)
    size = channels // repeats if channels % repeats == 0 else 1  # a grouped convolution loses the
    members = []  # same places of each of its groups: they go together
    filters = torch.zeros(size, dtype=torch.long)
    for name, side, indices, roots, layer in parts:
        units = torch.tensor(roots) % size
        members.append(Member(name, side, torch.tensor(indices), units))
        if side == "out" and isinstance(layer, (nn.Conv2d, nn.Linear)):
            filters += torch.bincount(units, minlength=size)
    return Group(members[0].layer, size, members, filters)


def _writes(graph, dependency) -> bool:
    return graph.is_out_channel_pruning_fn(dependency.handler)
