"""Layers timed by their shapes, and the multiples of channels with which they are fastest."""

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimming.channels.groups import Group, copied
from slimming.choosing.importance import layers
from slimming.choosing.threshold import Choice
from slimming.runtime import optional
from slimming.runtime.device import now

ROUNDS = 9
TOGETHER = 256  # shapes that take turns: oneDNN caches 1,024 kernels, a few for each shape


@dataclass(frozen=True)
class LayerShape:
    """A convolution with all that its speed depends on, for one image.

    ``size``: height and width of its input in pixels. A linear layer has no ``kernel``, and as
    ``size`` the number of rows that it multiplies for each image.
    """

    reads: int
    writes: int
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: Any = ()  # numbers of pixels, "same" or "valid"
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one image, channels last."""
        return (*self.size, self.reads)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Channels last."""
        return (self.writes, *self.kernel, self.reads // self.groups)


Clock = Callable[[], float]  # the time in seconds


def calls(model: nn.Module, shape: tuple[int, ...]) -> list[tuple[str, LayerShape]]:
    """The name and the shape of each call of a convolution or linear layer, for an image of this
    ``shape`` (C, H, W), in the order of the forward pass."""
    still, found = copied(model).cpu().float().eval(), []
    for name, layer in layers(still).items():
        layer.register_forward_hook(
            lambda layer, inputs, _, name=name: found.append((name, _shape(layer, inputs[0])))
        )
    with torch.no_grad():
        still(torch.zeros(1, *shape))
    return found


def _shape(layer: nn.Conv2d | nn.Linear, x: torch.Tensor) -> LayerShape:
    """The shape of a layer that reads ``x``, the activations of one image."""
    if isinstance(layer, nn.Linear):
        rows = x.numel() // layer.in_features
        return LayerShape(layer.in_features, layer.out_features, (rows,))
    return LayerShape(
        layer.in_channels,
        layer.out_channels,
        tuple(x.shape[2:]),
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )


@torch.no_grad()
def seconds(
    shapes: Iterable[LayerShape],
    batch: int,
    device: torch.device,
    clock: Clock | None = None,
    rounds: int = ROUNDS,
) -> dict[LayerShape, float]:
    """Median seconds of each shape on a ``batch`` of images: in fp32, channels last, with a bias,
    into which deployment folds BN.

    The shapes take turns, after a round of warm-up, so that load on the machine affects all of them
    equally; equal ones are measured once. All use views of one input and one weight tensor.
    ``clock`` synchronizes with the device by default.
    """
    read_clock, distinct = clock or functools.partial(now, device), list(dict.fromkeys(shapes))
    if not distinct:
        return {}
    inputs = max(batch * math.prod(shape.input_shape) for shape in distinct)
    weights = max(math.prod(shape.weight_shape) for shape in distinct)
    memory = [torch.randn(size, device=device) for size in (inputs, weights)]
    times: dict[LayerShape, list[float]] = {shape: [] for shape in distinct}
    chunks = [distinct[i : i + TOGETHER] for i in range(0, len(distinct), TOGETHER)]
    turns = [(turn, chunk) for chunk in chunks for turn in range(rounds + 1)]
    for turn, chunk in optional.bar(turns, desc="layers", leave=False, disable=None):
        for shape in chunk:
            run = _layer(shape, batch, *memory)
            start = read_clock()
            run()
            taken = read_clock() - start
            times[shape] += [taken] if turn else []
    return {shape: statistics.median(taken) for shape, taken in times.items()}


def _layer(
    shape: LayerShape, batch: int, inputs: torch.Tensor, weights: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """The layer as a function, on views of ``inputs`` and ``weights``."""
    x = inputs[: batch * math.prod(shape.input_shape)].view(batch, *shape.input_shape)
    weight = weights[: math.prod(shape.weight_shape)].view(shape.weight_shape)
    bias = weights[: shape.writes]
    if not shape.kernel:
        return lambda: F.linear(x.flatten(0, 1), weight, bias)
    x, weight = (tensor.permute(0, 3, 1, 2) for tensor in (x, weight))
    more = (shape.stride, shape.padding, shape.dilation, shape.groups)
    return lambda: F.conv2d(x, weight, bias, *more)


MULTIPLES = (1, 2, 4, 8, 16, 32)
NOISE = 0.01  # smaller relative differences of two times are noise

Times = Mapping[LayerShape, float]
Cost = Callable[[Iterable[LayerShape]], Times]  # see `seconds`
Whole = Callable[[Sequence[Mapping[str, int]]], Sequence[float]]


def fastest(
    coupled: list[Group],
    choices: Mapping[int, Choice],
    calls: list[tuple[str, LayerShape]],
    cost: Cost,
    whole: Whole,
    *,
    limited: bool = False,
    fewest: bool = False,
) -> dict[str, int]:
    """The multiple for each group of ``coupled`` channels with which the layers that write and read
    it take the least time, by the name of the group.

    ``choices`` are those of the channels to keep at the same ratio, one for each multiple;
    ``calls`` the layers of the dense network, see `calls`; ``cost`` measures
    them, and ``whole`` the slim networks with several sets of multiples, in seconds.

    First, all groups get the same multiple, that of the fastest network: kernels may need aligned
    channels on both sides, and much of the time may be spent outside of layers. From there each
    group tries the other multiples, its neighbours unchanged. If the network with all these changes
    is slower than without, none is made. So no single multiple is faster than the result by more
    than 2 NOISE: a layer changes with the group that it reads and the one that it writes.

    Of the multiples that are as fast as the fastest one, up to NOISE, a group gets the largest: it
    keeps at least as many channels, and those that cost no time are better kept, because the slim
    network is then closer to the dense one. They do cost FLOPs and parameters; for a budget on
    these, ``fewest`` takes the smallest multiple instead. For any budget, ``limited`` takes no
    multiple above the number of channels that a group keeps without rounding: then a network in
    which each group keeps one multiple is no larger, so that pruning more meets the budget.
    """
    network = _Rounded(coupled, choices, calls, limited)
    uniform = {m: network.limited(dict.fromkeys(network.groups, m)) for m in choices}
    totals = dict(zip(uniform, whole(list(uniform.values())), strict=True))
    sign = 1 if fewest else -1
    start = uniform[min(totals, key=lambda multiple: (totals[multiple], sign * multiple))]
    tried = {
        name: {m: network.shapes({**start, name: m}, name) for m in network.groups[name]}
        for name in network.groups
    }
    times = cost(s for shapes in tried.values() for some in shapes.values() for s in some)
    mixed = {}
    for name, shapes in tried.items():
        taken = {m: sum(times[shape] for shape in some) for m, some in shapes.items()}
        equal = [m for m in taken if taken[m] <= (1 + NOISE) * min(taken.values())]
        mixed[name] = min(equal) if fewest else max(equal)
    before, after = whole([start, mixed])
    return network.named(mixed if after <= (1 + 2 * NOISE) * before else start)


class _Rounded:
    """The layers of a slim network, for any multiple of each of its ``groups``: the multiples that
    each may have, by its name."""

    def __init__(
        self,
        coupled: list[Group],
        choices: Mapping[int, Choice],
        calls: list[tuple[str, LayerShape]],
        limited: bool,
    ):
        self.calls, self.choices = calls, choices
        keep = {m: choice.kept for m, choice in choices.items()}
        pruned = [group for group in coupled if all(group.name in masks for masks in keep.values())]
        kept = {group.name: int(keep[1][group.name].sum()) for group in pruned}
        self.groups = {
            name: [m for m in sorted(keep) if m <= max(1, count) or not limited]
            for name, count in kept.items()
        }
        # layer -> (group, side, multiple -> number of channels that it loses)
        self.removed: dict[str, list[tuple[str, str, dict[int, int]]]] = {}
        for group in pruned:
            for member in group.members:
                lost = {m: int((~keep[m][group.name][member.units]).sum()) for m in keep}
                self.removed.setdefault(member.layer, []).append((group.name, member.side, lost))

    def limited(self, multiples: Mapping[str, int]) -> dict[str, int]:
        """The largest multiple of each group that is no larger than the given one."""
        return {n: max(m for m in self.groups[n] if m <= multiples[n]) for n in multiples}

    def shapes(self, multiples: Mapping[str, int], group: str) -> list[LayerShape]:
        """The layers that write or read the ``group``, if each group keeps its multiple."""
        found = []
        for name, dense in self.calls:
            parts = self.removed.get(name, [])
            if group not in [part[0] for part in parts]:
                continue
            less = {"in": 0, "out": 0}
            for part, side, counts in parts:
                less[side] += counts[multiples[part]]
            found.append(_narrower(dense, less["in"], less["out"]))
        return found

    def named(self, multiples: Mapping[str, int]) -> dict[str, int]:
        """For each group, the multiple to report for its number of channels: of all multiples that
        give this number, the largest that divides it, else the smallest."""
        names = {}
        for group, multiple in multiples.items():
            counts = {m: int(choice.kept[group].sum()) for m, choice in self.choices.items()}
            count = counts[multiple]
            same = [m for m in self.groups[group] if counts[m] == count]
            names[group] = max((m for m in same if count % m == 0), default=same[0])
        return names


def _narrower(dense: LayerShape, unread: int, unwritten: int) -> LayerShape:
    """A layer without these numbers of channels, but with at least one in each of its groups."""
    if dense.groups == dense.reads == dense.writes > 1:  # depthwise
        left = max(1, dense.writes - unwritten)
        return replace(dense, reads=left, writes=left, groups=left)
    reads, writes = dense.reads - unread, dense.writes - unwritten
    return replace(dense, reads=max(dense.groups, reads), writes=max(dense.groups, writes))
