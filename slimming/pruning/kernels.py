"""Pruning inside filters: whole kernels (the k x k weights of one filter for one input channel),
and patterns of weights inside kernels.

Pruned weights are exactly zero. `GradientMask` keeps them at zero during fine-tuning; input
channels that no filter reads any more are removed by `slimming.slicing`.
"""

import math

import torch
from torch import nn

from slimming.channels.groups import Group
from slimming.channels.scaling import Masks
from slimming.channels.widths import is_depthwise, layer_of
from slimming.pruning.choice import Choice

PATTERNS = 16  # patterns per layer: fast sparse kernels support only a few
SPARSE = 0.001  # fraction of zero weights above chance: an untrained VGG has 2 in 9 million


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of ``model`` by name."""
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}


def kernel_masks(model: nn.Module, ratio: float, local: bool = True) -> Masks:
    """Masks of the weights to keep when the fraction ``ratio`` of kernels with the smallest L1 norm
    is pruned.

    Name of a layer -> bools like its weight (out, in, k, k). Norms are divided by k² to make
    layers with different kernel sizes comparable; with ``local`` each layer loses the same
    fraction. A filter keeps its largest kernel. Depthwise convolutions keep all of theirs, because
    each kernel is a whole filter.
    """
    norms = {
        n: layer.weight.detach().abs().mean((2, 3))
        for n, layer in convolutions(model).items()
        if not is_depthwise(layer)
    }
    masks = {}
    for name, keep in _largest(norms, ratio, local).items():
        best = norms[name].argmax(1, keepdim=True)
        shape = layer_of(model, name).weight.shape
        masks[name] = keep.scatter(1, best, True)[:, :, None, None].expand(shape).clone()
    return masks


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


def unread_channels(model: nn.Module, coupled: list[Group]) -> Choice:
    """Keep the channels of each group that some layer still reads; the others can be removed."""
    alive, keep = {group.name: group.alive for group in coupled}, {}
    for group in coupled:
        read = torch.zeros(group.size, dtype=torch.bool)
        for member in (member for member in group.members if member.side == "in"):
            layer = layer_of(model, member.layer)
            weight, groups = layer.weight.detach().cpu(), getattr(layer, "groups", 1)
            used = (weight != 0).unflatten(0, (groups, -1)).transpose(1, 2).flatten(2).any(2)
            read[member.units[used.flatten()[member.channels]]] = True
        if not read.any():
            read[group.alive.nonzero()[0]] = True
        keep[group.name] = read
    return Choice(0.0, 0.0, alive, keep, [])
