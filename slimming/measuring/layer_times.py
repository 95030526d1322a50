"""The latency of single layers, by their shapes."""

import functools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimming.channels.groups import copied
from slimming.pruning.importance import layers
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
