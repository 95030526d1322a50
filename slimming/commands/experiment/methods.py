"""The pruning methods of run.py, by name: each prunes the network of a `Task`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from slimming.channels.groups import Group, copied, count_filters, inside
from slimming.channels.scaling import Masks
from slimming.choosing import allocation as choosing_allocation
from slimming.choosing import importance, ranking
from slimming.choosing.allocation import Prunable
from slimming.choosing.threshold import LEAST, Choice, Multiples
from slimming.commands import pruning
from slimming.commands.pruning import BudgetSettings, RoundTo
from slimming.data import loading
from slimming.data.loading import Data
from slimming.slicing import kernels
from slimming.slicing.prune import Slimmed, apply, groups
from slimming.slicing.slim import slim_to

SAMPLES = 2560  # training images for measures with gradients


@dataclass(frozen=True)
class Task:
    """A dense network on the CPU, and how to prune it.

    The fraction ``ratio`` (0 <= ratio < 1) is pruned: of each layer if ``local``, else in one
    ranking over the network; each layer keeps at least the fraction ``least`` of its channels.
    ``measure`` is a name in `slimming.choosing.importance`. ``images``
    (N, 3, H, W) are test images for the proof, on the device to use; ``training`` loads the
    training batches, for measures that need them. ``allocation``, see
    `slimming.choosing.allocation`, replaces ``measure`` and ``local``. ``find_ratio(prune, total,
    *notes)``, if given, finds another ratio for a network of ``total`` filters, see
    `slimming.commands.pruning`. ``round_to`` may be "auto", see `slimming.commands.pruning`.
    """

    model: nn.Module
    images: torch.Tensor
    training: Callable[[], Data]
    ratio: float
    measure: str
    local: bool = True
    least: float = LEAST
    round_to: RoundTo = 1
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    ignore: Sequence[str] = ()
    seed: int = 1
    allocation: str | None = None
    find_ratio: Callable[..., float] | None = None


def channels(task: Task) -> Slimmed:
    """Remove whole filters, the least important first."""
    scores = {} if task.allocation else _scores(task)
    model = task.model.cpu()
    coupled = groups(model, task.images, task.ignore)

    def choose(ratio: float, multiples: Multiples) -> Choice:
        if task.allocation:
            prunable = Prunable(model, coupled, multiples, least=task.least)
            return choosing_allocation.choose(prunable, ratio, task.allocation)
        return ranking.choose(
            coupled, scores, ratio, local=task.local, round_to=multiples, least=task.least
        )

    multiples = _multiples(task, model, coupled, choose)
    ratio = _ratio(task, model, coupled, partial(choose, multiples=multiples))
    return apply(model, coupled, choose(ratio, multiples), task.images)


def _multiples(
    task: Task,
    model: nn.Module,
    coupled: list[Group],
    choose: Callable[..., Choice],
) -> Multiples:
    """What the groups keep a multiple of; ``choose(ratio, multiples)``: the units to keep."""
    if isinstance(task.round_to, int):
        return task.round_to
    ratio = _ratio(task, model, coupled, partial(choose, multiples=1), pruning.WITHOUT)
    at_ratio = partial(choose, ratio)
    return pruning.measured(model, coupled, at_ratio, task.images, task.budget)


def _ratio(
    task: Task,
    model: nn.Module,
    coupled: list[Group],
    choose: Callable[[float], Choice],
    *notes: str,
) -> float:
    """The fraction to prune, that of a budget if there is one."""

    def prune(ratio: float) -> nn.Module:
        return slim_to(model, coupled, choose(ratio).kept)[0]

    return task.find_ratio(prune, count_filters(coupled), *notes) if task.find_ratio else task.ratio


def _scores(task: Task) -> importance.Scores:
    model, batches = task.model, []
    if task.measure not in importance.GRADIENT_FREE:
        balanced = task.measure == "grasp"
        batches = loading.samples(task.training(), SAMPLES, 0, balanced)
        model = model.to(task.images.device)
    temperature = importance.TEMPERATURES.get(task.measure, 1.0)
    evidence = importance.Evidence(model, batches, temperature, seed=task.seed)
    return importance.MEASURES[task.measure](evidence)


def whole_kernels(task: Task) -> Slimmed:
    """Zero kernels, first those of the channels that would keep the fewest; remove these channels,
    and those that no filter reads any more."""
    model, image = copied(task.model), task.images[:1]
    removable = groups(model, image, task.ignore)
    alone = kernels.kernel_masks(model, task.ratio, task.local)
    weak = kernels.weak_channels(model, removable, alone, task.ratio)
    first = kernels.kernels_of(model, removable, weak)
    masks = kernels.kernel_masks(model, task.ratio, task.local, first)
    inner = {m.layer for group in groups(model, image) for m in group.members}
    masks = {name: mask for name, mask in masks.items() if name in inner}
    kernels.zero_weights(model, _without(masks, task.ignore))
    choice = kernels.unread_channels(model, removable, weak)
    return apply(model, removable, choice, task.images)


def patterns(task: Task) -> nn.Module:
    """Zero the weights outside the pattern of each kernel; the network keeps its shape."""
    model = copied(task.model)
    masks = kernels.pattern_masks(model, task.ratio, task.local)
    kernels.zero_weights(model, _without(masks, task.ignore))
    return model


METHODS: dict[str, Callable[[Task], Slimmed | nn.Module]] = {
    "channel": channels,
    "slimming": channels,
    "kernel": whole_kernels,
    "intra-kernel": patterns,
}


def _without(masks: Masks, ignore: Sequence[str]) -> Masks:
    return {n: m for n, m in masks.items() if not any(inside(n, i) for i in ignore)}
