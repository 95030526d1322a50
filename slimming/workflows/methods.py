"""The pruning methods of run.py, by name: each turns a `Task` into a `Pruned` network."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from slimming.data import loading
from slimming.data.batches import Batches
from slimming.data.stream import Stream
from slimming.pruning import allocation, importance, kernels, ranking, slicing
from slimming.pruning.allocation import Prunable
from slimming.pruning.choice import Choice
from slimming.pruning.coupling import count_filters, inside
from slimming.pruning.groups import groups
from slimming.pruning.scaling import Masks

SAMPLES = 2560  # training images for measures with gradients


@dataclass(frozen=True)
class Task:
    """A dense network on the CPU, and how to prune it.

    The fraction ``ratio`` (0 <= ratio < 1) is pruned: of each layer if ``local``, else in one
    ranking over the network. ``measure`` is a name in `slimming.pruning.importance`. ``images``
    (N, 3, H, W) are test images for the proof, on the device to use; ``training`` loads the
    training batches, for measures that need them. ``allocation``, see
    `slimming.pruning.allocation`, replaces ``measure`` and ``local``. ``fit(prune, total)``, if
    given, finds another ratio for a network of ``total`` filters, see
    `slimming.workflows.budgets`.
    """

    model: nn.Module
    images: torch.Tensor
    training: Callable[[], Batches | Stream]
    ratio: float
    measure: str
    local: bool = True
    round_to: int = 1
    ignore: Sequence[str] = ()
    seed: int = 1
    allocation: str | None = None
    fit: Callable[[Callable[[float], nn.Module], int], float] | None = None


@dataclass(frozen=True)
class Pruned:
    """A pruned network, the choice of channels, and the largest relative difference between its
    logits and those of the masked dense network; both None if the network keeps its shape.
    ``kept``: which channels of each layer are left."""

    model: nn.Module
    choice: Choice | None = None
    difference: float | None = None
    kept: slicing.Kept = field(default_factory=dict)


def channels(task: Task) -> Pruned:
    """Remove whole filters, the least important first."""
    scores = {} if task.allocation else _scores(task)
    model = task.model.cpu()
    coupled = groups(model, task.images, task.ignore)
    prunable = Prunable(model, coupled, task.round_to)

    def choose(ratio: float) -> Choice:
        if task.allocation:
            return allocation.choose(prunable, ratio, task.allocation)
        return ranking.choose(coupled, scores, ratio, local=task.local, round_to=task.round_to)

    def prune(ratio: float) -> nn.Module:
        return prunable.slim(choose(ratio))[0]

    ratio = task.ratio if task.fit is None else task.fit(prune, count_filters(coupled))
    slimmed = slicing.apply(model, coupled, choose(ratio), task.images)
    return Pruned(slimmed.model, slimmed.choice, slimmed.difference, slimmed.kept)


def _scores(task: Task) -> importance.Scores:
    model, batches = task.model, []
    if task.measure not in importance.GRADIENT_FREE:
        balanced = task.measure == "grasp"
        batches = loading.samples(task.training(), SAMPLES, 0, balanced)
        model = model.to(task.images.device)
    temperature = importance.TEMPERATURES.get(task.measure, 1.0)
    evidence = importance.Evidence(model, batches, temperature, seed=task.seed)
    return importance.MEASURES[task.measure](evidence)


def whole_kernels(task: Task) -> Pruned:
    """Zero kernels; remove the channels that no filter reads any more."""
    model, image = copy.deepcopy(task.model), task.images[:1]
    masks = kernels.kernel_masks(model, task.ratio, task.local)
    inner = {m.layer for group in groups(model, image) for m in group.members}
    masks = {name: mask for name, mask in masks.items() if name in inner}
    kernels.zero_weights(model, _without(masks, task.ignore))
    removable = groups(model, image, task.ignore)
    choice = kernels.unread_channels(model, removable)
    slimmed = slicing.apply(model, removable, choice, task.images)
    return Pruned(slimmed.model, slimmed.choice, slimmed.difference, slimmed.kept)


def patterns(task: Task) -> Pruned:
    """Zero the weights outside the pattern of each kernel; the network keeps its shape."""
    model = copy.deepcopy(task.model)
    masks = kernels.pattern_masks(model, task.ratio, task.local)
    kernels.zero_weights(model, _without(masks, task.ignore))
    return Pruned(model)


METHODS: dict[str, Callable[[Task], Pruned]] = {
    "channel": channels,
    "slimming": channels,
    "kernel": whole_kernels,
    "intra-kernel": patterns,
}


def _without(masks: Masks, ignore: Sequence[str]) -> Masks:
    return {n: m for n, m in masks.items() if not any(inside(n, i) for i in ignore)}
