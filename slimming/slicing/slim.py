"""Build the network that has only the kept channels, and the masked one that it must equal."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from slimming.channels.groups import Group, copied
from slimming.channels.kinds import is_depthwise, kind_of
from slimming.errors import UserError

Masks = dict[str, torch.Tensor]  # name of a layer or group -> one bool for each channel
Kept = dict[str, Masks]  # name of a layer or parameter -> side (see `Member`) -> mask


def kept_channels(coupled: Iterable[Group], keep: Mapping[str, torch.Tensor]) -> Kept:
    """The channels that each layer keeps when each group keeps the units ``keep[name]``; layers and
    groups without an entry keep all. ValueError for an unknown group."""
    named = {group.name: group for group in coupled}
    if unknown := keep.keys() - named.keys():
        raise ValueError(f"the network has no groups called {', '.join(sorted(unknown))}")
    kept: Kept = {}
    for name, group in named.items():
        if name not in keep or keep[name].all():
            continue
        for member in group.members:
            sides = kept.setdefault(member.layer, {})
            whole = torch.ones(member.width, dtype=torch.bool)
            mask = sides.setdefault(member.side, whole)
            mask[member.channels] &= keep[name][member.units]
    return kept


def cuts(model: nn.Module, kept: Kept) -> dict[str, dict[int, torch.Tensor]]:
    """Which positions stay along each dimension of each parameter and buffer, by its name."""
    masks: dict[str, dict[int, torch.Tensor]] = {}
    for name, sides in kept.items():
        for side, mask in sides.items():
            if side.startswith("dim "):
                masks.setdefault(name, {})[int(side[4:])] = mask
                continue
            layer = model.get_submodule(name)
            kind = kind_of(layer)
            if side not in ("in", "out") or kind is None:
                continue
            for part, dim in (kind.into if side == "in" else kind.out).items():
                if isinstance(getattr(layer, part, None), torch.Tensor):
                    own = of_one_group(layer, mask) if part == "weight" and dim == 1 else mask
                    masks.setdefault(f"{name}.{part}".lstrip("."), {})[dim] = own
    return masks


def of_one_group(layer: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """A mask of channels along the second dimension of a weight, which is that of one group."""
    groups = layer.groups if isinstance(layer, _ConvNd) and not is_depthwise(layer) else 1
    return mask.view(groups, -1)[0]


def slice_tensors(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], kept: Kept
) -> dict[str, torch.Tensor]:
    """Slice ``tensors``, which have the names and shapes of the parameters and buffers of the dense
    ``model``: weights, momentum, initial values, averages of gradients."""
    left = dict(tensors)
    for name, dims in cuts(model, kept).items():
        if name in left:
            for dim, mask in dims.items():
                stays = mask.nonzero().flatten().to(left[name].device)
                left[name] = left[name].index_select(dim, stays)
    for name, sides in kept.items():
        if "mask" in sides and (indexes := f"{name}.indexes".lstrip(".")) in left:
            left[indexes] = sides["mask"].to(left[indexes])
    return left


@torch.no_grad()
def sliced(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of ``model`` that has only the kept channels: of the same class, on the same device,
    in the same mode, with the same hooks."""
    small = copied(model)
    state = dict(small.named_parameters(remove_duplicate=False))
    state |= dict(small.named_buffers(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    left = slice_tensors(small, state, kept)
    changed = {n for n, tensor in left.items() if tensor is not state[n]}
    for name in changed:
        old = state[name]
        new = nn.Parameter(left[name], old.requires_grad) if is_parameter(old) else left[name]
        for other in names[id(old)]:  # tied parameters stay one
            replace(small, other, new)
    for name, sides in kept.items():
        for side, mask in sides.items():
            if side.startswith("size "):
                set_number(small.get_submodule(name), len(mask), int(mask.sum()))
    return small


def is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def replace(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put another parameter or buffer in place of one of ``model``, of another shape, and set the
    attributes of its layer."""
    owner, _, part = name.rpartition(".")
    layer = model.get_submodule(owner)
    kind = kind_of(layer)
    leading = next(iter({**kind.out})) if kind else None
    numbers = kind.attributes(layer, tensor.shape) if kind and part == leading else {}
    setattr(layer, part, tensor)
    for attribute, value in numbers.items():
        setattr(layer, attribute, value)


def set_number(module: nn.Module, old: int, new: int) -> None:
    """Set the attributes of a module, of a user's own class, that hold the number ``old``."""
    for name, value in list(vars(module).items()):
        if type(value) is int and value == old:
            setattr(module, name, new)
        elif isinstance(value, (list, tuple)) and any(type(v) is int and v == old for v in value):
            setattr(module, name, type(value)(new if type(v) is int and v == old else v for v in value))
    if isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * new // old


@torch.no_grad()
def masked(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the dense network in which no layer reads the removed channels: its weights for
    them are zero."""
    zeroed = copied(model)
    state = dict(zeroed.named_parameters(remove_duplicate=False))
    for name, sides in kept.items():
        if "in" in sides:
            for part, dims in cuts(zeroed, {name: {"in": sides["in"]}}).items():
                for dim, mask in dims.items():
                    gone = (~mask).nonzero().flatten().to(state[part].device)
                    state[part].index_fill_(dim, gone, 0)
    return zeroed


