"""Pruning inside filters: whole kernels (the k x k weights of one filter for one input channel),
and patterns of weights inside kernels.

Pruned weights are exactly zero. `GradientMask` keeps them at zero during fine-tuning; input
channels that no filter reads any more are removed by `slimming.slicing`.
"""

import math

import torch
from torch import nn

from slimming.channels.groups import Group, Member
from slimming.channels.scaling import Masks
from slimming.channels.widths import is_depthwise, layer_of
from slimming.choosing.threshold import Choice

WHOLE = 0.5  # fraction of the pruned kernels that go with whole channels
PATTERNS = 16  # patterns per layer: fast sparse kernels support only a few
SPARSE = 0.001  # fraction of zero weights above chance: an untrained VGG has 2 in 9 million


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of ``model`` by name."""
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}


def kernel_masks(
    model: nn.Module, ratio: float, local: bool = True, first: Masks | None = None
) -> Masks:
    """Masks of the weights to keep when the fraction ``ratio`` of kernels with the smallest L1 norm
    is pruned.

    Name of a layer -> bools like its weight (out, in, k, k). Norms are divided by k² to make
    layers with different kernel sizes comparable; with ``local`` each layer loses the same
    fraction. The kernels of ``first``, name of a layer -> bools (out, in), are pruned before all
    others. A filter keeps its largest kernel, unless all of its kernels are in ``first``. Depthwise
    convolutions keep all of theirs, because each kernel is a whole filter.
    """
    norms = {
        n: layer.weight.detach().abs().mean((2, 3))
        for n, layer in convolutions(model).items()
        if not is_depthwise(layer)
    }
    for name, gone in (first or {}).items():
        norms[name] = norms[name].masked_fill(gone, -1)
    masks = {}
    for name, keep in _largest(norms, ratio, local).items():
        largest, best = norms[name].max(1, keepdim=True)
        shape = layer_of(model, name).weight.shape
        kept = keep.scatter(1, best, keep.gather(1, best) | (largest >= 0))
        masks[name] = kept[:, :, None, None].expand(shape).clone()
    return masks


def weak_channels(model: nn.Module, coupled: list[Group], masks: Masks, ratio: float) -> Masks:
    """The units of each group to prune as a whole: those of which ``masks``, see `kernel_masks`,
    keep the smallest fraction of the kernels that write or read them.

    Name of a group -> one bool for each unit. Their number is 1 - sqrt(1 - WHOLE · ``ratio``) of
    the units, with which the fraction WHOLE of the pruned kernels goes, if inputs and outputs lose
    alike.
    """
    weak = {}
    for group in coupled:
        kept, layers = torch.zeros(2, group.size)
        for member in group.members:
            if member.layer in masks and _has_kernels(model, member):
                mask = masks[member.layer].flatten(2).any(2).float().cpu()
                share = mask.mean(1 if member.side == "out" else 0)
                kept.index_add_(0, member.units, share[member.channels])
                layers[member.units] += 1
        alive, prunable = int(group.alive.sum()), group.alive & (layers > 0)
        order = (kept / layers).masked_fill(~prunable, math.inf).argsort(stable=True)
        count = int((1 - math.sqrt(1 - WHOLE * ratio)) * alive)
        count = min(count, int(prunable.sum()))
        weak[group.name] = torch.zeros_like(group.alive).index_fill(0, order[:count], True)
    return weak


def _has_kernels(model: nn.Module, member: Member) -> bool:
    """Whether each channel of a member is a row or a column of kernels."""
    layer = model.get_submodule(member.layer)
    return isinstance(layer, nn.Conv2d) and layer.groups == 1 and member.side != "mask"


def kernels_of(model: nn.Module, coupled: list[Group], units: Masks) -> Masks:
    """All kernels that write or read ``units`` (name of a group -> bools), for `kernel_masks`."""
    found: Masks = {}
    for group in coupled:
        for member in group.members:
            if not _has_kernels(model, member):
                continue
            weight = layer_of(model, member.layer).weight
            gone = found.setdefault(
                member.layer, torch.zeros_like(weight[:, :, 0, 0], dtype=torch.bool)
            )
            channels = member.channels[units[group.name][member.units]]
            if member.side == "out":
                gone[channels] = True
            else:
                gone[:, channels] = True
    return found


def pattern_masks(model: nn.Module, ratio: float, local: bool = True) -> Masks:
    """Masks of the weights to keep when each kernel keeps a pattern of about k² · (1 - ratio).

    The largest weights of each kernel form a pattern. A layer uses the PATTERNS most frequent ones;
    each kernel gets the one that keeps the most magnitude (as in PatDNN, Niu et al., ASPLOS 2020).
    Without ``local``, layers with large weights keep more. 1x1 kernels have no patterns: a network
    with many of them loses less than ``ratio`` in total.
    """
    layers = {n: m for n, m in convolutions(model).items() if math.prod(m.kernel_size) > 1}
    sizes = {n: layer.weight.detach().abs() for n, layer in layers.items()}
    largest = _largest(sizes, ratio, local)
    masks = {}
    for name, size in sizes.items():
        kernels = size.flatten(2).flatten(0, 1)  # (out · in, k²)
        count = max(1, round(float(largest[name].float().mean()) * kernels.shape[1]))
        own = torch.zeros_like(kernels).scatter(1, kernels.topk(count).indices, 1)
        patterns, uses = own.unique(dim=0, return_counts=True)
        patterns = patterns[uses.argsort(descending=True, stable=True)[:PATTERNS]]
        chosen = (kernels @ patterns.T).argmax(1)
        masks[name] = patterns[chosen].bool().view_as(size)
    return masks


def _largest(values: Masks, ratio: float, local: bool) -> Masks:
    """Masks of the largest (1 - ratio) ``values``: over all tensors, or in each with ``local``."""
    if local or not values:
        return {name: _above(value, ratio) for name, value in values.items()}
    together = _above(torch.cat([value.flatten() for value in values.values()]), ratio)
    parts = together.split([value.numel() for value in values.values()])
    return {n: part.view_as(values[n]) for n, part in zip(values, parts, strict=True)}


def _above(values: torch.Tensor, ratio: float) -> torch.Tensor:
    keep = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
    keep[values.flatten().argsort(stable=True)[: int(values.numel() * ratio + 1e-9)]] = False
    return keep.view_as(values)


@torch.no_grad()
def zero_weights(model: nn.Module, masks: Masks) -> None:
    """Set the weights that are False in ``masks`` to zero, in place."""
    for name, keep in masks.items():
        layer_of(model, name).weight.mul_(keep)


def zero_masks(model: nn.Module) -> dict[torch.Tensor, torch.Tensor]:
    """Masks of the nonzero weights of the convolutions that have zeros, for `GradientMask`."""
    weights = [layer.weight for layer in convolutions(model).values()]
    return {weight: (weight != 0).to(weight.dtype) for weight in weights if (weight == 0).any()}


def unread_channels(model: nn.Module, coupled: list[Group], weak: Masks | None = None) -> Choice:
    """Keep the channels of each group that some layer still reads and that are not ``weak``; the
    others can be removed."""
    alive, keep = {group.name: group.alive for group in coupled}, {}
    for group in coupled:
        read = torch.zeros(group.size, dtype=torch.bool)
        for member in (member for member in group.members if member.side == "in"):
            layer = layer_of(model, member.layer)
            weight, groups = layer.weight.detach().cpu(), getattr(layer, "groups", 1)
            used = (weight != 0).unflatten(0, (groups, -1)).transpose(1, 2).flatten(2).any(2)
            read[member.units[used.flatten()[member.channels]]] = True
        if weak and (read & ~weak[group.name]).any():
            read &= ~weak[group.name]
        if not read.any():
            read[group.alive.nonzero()[0]] = True
        keep[group.name] = read
    return Choice(0.0, 0.0, alive, keep, [])
