"""Build the network that has only the kept channels, and the masked one that it must equal."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from slimming.channels.groups import Group, copied, lists_widths, with_selections
from slimming.channels.kinds import Convolution, is_depthwise, kind_of, put
from slimming.channels.scaling import Masks, present_channels, selections
from slimming.channels.widths import fit_to, widths
from slimming.errors import UserError

# an attribute of modules whose code holds numbers of channels: the names of these attributes
NUMBERS = "numbers_of_channels"
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
            if side.startswith(("dim ", "in ")):
                masks.setdefault(name, {})[int(side.split()[1])] = mask
                continue
            layer = model.get_submodule(name)
            kind = kind_of(layer)
            if side not in ("in", "out") or kind is None:
                continue
            for part, dim in (kind.into if side == "in" else kind.out).items():
                if isinstance(getattr(layer, part, None), torch.Tensor):
                    own = of_one_group(layer, mask) if part == "weight" and dim == 1 else mask
                    masks.setdefault(f"{name}.{part}".lstrip("."), {})[dim] = own
    return masks | {
        name: {dim: mask for other in tied if other in masks for dim, mask in masks[other].items()}
        for tied in _tied(model)
        for name in tied
        if any(other in masks for other in tied)
    }


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def of_one_group(layer: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """A mask of channels along the second dimension of a weight, which is that of one group."""
    groups = layer.groups if isinstance(layer, Convolution) and not is_depthwise(layer) else 1
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
    whole = selections(model)
    for name, sides in kept.items():
        if "mask" not in sides:
            continue
        indexes = f"{whole.get(name, name)}.indexes"
        if indexes in left:
            left[indexes] = sides["mask"].to(left[indexes])
        if name in whole:  # the original writes zeros where a selection drops a channel
            for part in (f"{name}.weight", f"{name}.bias"):
                if part in left:
                    left[part] = left[part] * sides["mask"].to(left[part])
    return left


@torch.no_grad()
def sliced(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of ``model`` that has only the kept channels: of the same class, on the same device,
    in the same mode, with the same hooks."""
    small = with_selections(model)
    state: dict[str, torch.Tensor] = {**dict(small.named_parameters(remove_duplicate=False))}
    state.update(small.named_buffers(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    left = slice_tensors(small, state, kept)
    changed = {n for n, tensor in left.items() if tensor is not state[n]}
    for name in changed:
        old = state[name]
        new = left[name]
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        for other in names[id(old)]:  # tied parameters stay one
            owner, _, part = other.rpartition(".")
            put(small.get_submodule(owner), part, new)
    for name, sides in kept.items():
        sizes = {len(mask): int(mask.sum()) for side, mask in sides.items() if side[:5] == "size "}
        if sizes:
            follow_sizes(small.get_submodule(name), sizes)
    return _with_cfg(small)


def slim_to(
    model: nn.Module, coupled: Iterable[Group], keep: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, Kept]:
    """The network in which each group keeps the units ``keep[name]``, not proved, and the channels
    that its layers keep."""
    kept = kept_channels(coupled, keep)
    return sliced(model, kept), kept


def follow_sizes(module: nn.Module, sizes: Mapping[int, int]) -> None:
    """Set the attributes of a module, of a user's own class or without parameters, that hold
    numbers of channels: ``sizes``, the new number for each old one."""

    def new(value: Any) -> Any:
        return sizes.get(value, value) if type(value) is int else value

    changed: dict[str, Any] = {}
    if kind := kind_of(module):
        for old in sizes:
            changed |= kind.attributes(module, [sizes[old]])
    else:
        for name, value in list(vars(module).items()):
            follows = type(value) in (int, list, tuple, torch.Size) and name != NUMBERS
            after = value
            if follows:
                after = new(value) if type(value) is int else type(value)(map(new, value))
            if follows and after != value:
                changed[name] = after
    _assign(module, changed)


def _assign(module: nn.Module, numbers: Mapping[str, Any]) -> None:
    """Set attributes of a module, and note which they are, for files."""
    for name, value in numbers.items():
        setattr(module, name, value)
    noted = dict.fromkeys([*getattr(module, NUMBERS, ()), *numbers])
    vars(module)[NUMBERS] = list(noted)


def numbers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The numbers of channels in attributes that slicing has set, by module and attribute. The
    weights do not tell them."""
    return {
        name: {attribute: getattr(module, attribute) for attribute in noted}
        for name, module in model.named_modules()
        if (noted := getattr(module, NUMBERS, None))
    }


def set_numbers(model: nn.Module, numbers: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the `numbers_of` a slim network in the dense one that it comes from. UserError, with the
    model unchanged, if that has no such numbers, or smaller ones."""
    modules = dict(model.named_modules())
    found: dict[str, dict[str, Any]] = {}
    for name, attributes in numbers.items():
        for attribute, value in attributes.items():
            dense: Any = vars(modules[name]).get(attribute) if name in modules else None
            pairs = [(value, dense)]
            both = isinstance(dense, (list, tuple)) and isinstance(value, (list, tuple))
            if both and len(value) == len(dense):
                pairs = [(a, b) for a, b in zip(value, dense, strict=True) if a != b]
                value = type(dense)(value)
            if any(type(a) is not int or type(b) is not int or not 0 < a <= b for a, b in pairs):
                raise UserError(
                    f"the file has {attribute} = {value} for {name or 'the network'}, the dense "
                    f"network {dense}: it is of another network"
                )
            found.setdefault(name, {})[attribute] = value
    for name, attributes in found.items():
        _assign(modules[name], attributes)


def unsaved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are not in the state dict, by name."""
    saved = model.state_dict()
    return {name: value for name, value in model.named_buffers() if name not in saved}


@torch.no_grad()
def masked(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the dense network in which no layer reads the removed channels: its weights for
    them are zero."""
    zeroed = copied(model)
    state: dict[str, torch.Tensor] = dict(zeroed.named_parameters(remove_duplicate=False))
    state |= dict(zeroed.named_buffers(remove_duplicate=False))
    read = {
        n: {s: m for s, m in sides.items() if s.split()[0] == "in"} for n, sides in kept.items()
    }
    for part, dims in cuts(zeroed, read).items():
        for dim, mask in dims.items():
            gone = (~mask).nonzero().flatten().to(state[part].device)
            state[part].index_fill_(dim, gone, 0)
    return zeroed


def scatter(slim: nn.Module, masked: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the ``masked`` network with the weights of the equal ``slim`` network written to
    the channels that are kept: the inverse of `sliced`."""
    state = {name: value.clone() for name, value in masked.state_dict().items()}
    masks = cuts(masked, kept)
    for name, value in slim.state_dict().items():
        if name not in state or not value.dim():
            continue
        place = [torch.arange(size) for size in state[name].shape]
        for dim, mask in masks.get(name, {}).items():
            place[dim] = mask.nonzero().flatten()
        state[name][torch.meshgrid(*place, indexing="ij")] = value.to(state[name])
    filled = copied(masked)
    filled.load_state_dict(state)
    return filled


def load_slim_state(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """Load the state dict of a slim network into the dense ``model`` that it comes from: its layers
    get the widths of the tensors, in place. UserError if ``state`` is of another network.

    >>> slim = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    >>> dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> load_slim_state(dense, slim.state_dict())[0]
    Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1))
    """
    try:
        fit_to(model, state).load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"these are not weights of a slim version of the network: {reason}") from (
            error
        )
    return _with_cfg(model)


def cfg_of(model: nn.Module, keep: Masks | None = None) -> dict | list:
    """The ``cfg`` with which the dense constructor builds a network of these widths: a dict of the
    widths of each layer or, for the paper's networks, the list of the kept channels of each BN (of
    ``keep``; by default those that reach the next layer) with VGG's 'M'."""
    if not lists_widths(model):
        return widths(model)
    stay = present_channels(model) | (keep or {})
    assert isinstance(model.cfg, list)
    counts = iter([int(mask.sum()) for mask in stay.values()])
    return [entry if entry == "M" else next(counts) for entry in model.cfg]


def _with_cfg(small: nn.Module) -> nn.Module:
    """The network itself, with its ``cfg`` updated if it lists widths."""
    if lists_widths(small):
        vars(small)["cfg"] = cfg_of(small)
    return small
