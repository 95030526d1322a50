"""Parameters, FLOPs, bytes and latency of a network."""

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimming.channels import inputs as arguments
from slimming.channels.groups import copied
from slimming.channels.inputs import Inputs
from slimming.measuring.deploy import deploy
from slimming.pruning.importance import layers
from slimming.runtime.device import layout_for, now
from slimming.storage import checkpoint


class Counts(NamedTuple):
    """Parameters, and FLOPs of one image. The effective counts exclude weights that are exactly
    zero: they are the cost for a program that skips zeros."""

    parameters: int
    effective_parameters: int
    flops: int
    effective_flops: int


def count_parameters(model: nn.Module, masks: bool = False) -> int:
    """The number of weights. The masks of channel selection are counted only with ``masks``, as
    the original scripts do."""
    parameters = model.named_parameters()
    return sum(p.numel() for n, p in parameters if masks or not n.endswith("select.indexes"))


def count_flops(model: nn.Module, size: int = 32) -> int:
    """FLOPs (2 x multiply-accumulates) of the convolutions and linear layers for one image.

    ``size``: height and width of the image in pixels.
    """
    return flops_with(model, torch.zeros(1, 3, size, size))[0]


def count_zeros(model: nn.Module) -> dict[str, int]:
    """How many weights of each convolution and linear layer are exactly zero."""
    return {name: int((layer.weight == 0).sum()) for name, layer in layers(model).items()}


def count_all(model: nn.Module, shape: tuple[int, ...] = (3, 32, 32)) -> Counts:
    """All counts, from one forward pass of an image of this ``shape`` (C, H, W)."""
    return count_with(model, torch.zeros(1, *shape))


def count_with(model: nn.Module, inputs: Inputs) -> Counts:
    """All counts, from one forward pass of ``inputs``, which are one sample: a tensor, a tuple of
    arguments or a dict of keyword arguments."""
    parameters, zeros = count_parameters(model), count_zeros(model)
    flops, of_layer = flops_with(model, inputs)
    saved = sum(
        round(of_layer.get(name, 0) * zeros[name] / layer.weight.numel())
        for name, layer in layers(model).items()
    )
    return Counts(parameters, parameters - sum(zeros.values()), flops, flops - saved)


def count_effective(model: nn.Module, size: int = 32) -> tuple[int, int]:
    """Effective parameters and effective FLOPs, see `Counts`."""
    counts = count_all(model, (3, size, size))
    return counts.effective_parameters, counts.effective_flops


def flops_of_layers(model: nn.Module, size: int = 32) -> dict[str, int]:
    """FLOPs of each convolution and linear layer for one image of ``size`` pixels."""
    of_layer = flops_with(model, torch.zeros(1, 3, size, size))[1]
    return {name: of_layer[name] for name in layers(model) if name in of_layer}


def flops_with(model: nn.Module, inputs: Inputs) -> tuple[int, dict[str, int]]:
    """FLOPs of ``inputs``, one sample: total, and of each layer by name, over all its calls.

    RuntimeError if FlopCounterMode does not see a layer of PyTorch's own run on a batch: its counts
    would be wrong.
    """
    still = copied(model).cpu().float().eval()
    one = arguments.like(inputs, "cpu", torch.float32)
    of_layer, before = Counter[str](), {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():

        def start(name: str) -> None:
            before[name] = counter.get_total_flops()

        def end(name: str, layer: nn.Module, output: Any) -> None:
            flops = counter.get_total_flops() - before[name]
            own = type(layer) in (nn.Conv2d, nn.Linear) and isinstance(output, torch.Tensor)
            if flops <= 0 and own and output.dim() > 1 and output.numel():
                raise RuntimeError(f"torch.utils.flop_counter counts no FLOPs of the layer {name}")
            of_layer[name] += flops

        for name, layer in layers(still).items():
            layer.register_forward_pre_hook(lambda *_, name=name: start(name))
            layer.register_forward_hook(
                lambda layer, _, output, name=name: end(name, layer, output)
            )
        arguments.call(still, one)
    return counter.get_total_flops(), of_layer


def count_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights on disk, without an optimizer."""
    return len(checkpoint.serialize(model.state_dict()))


@torch.no_grad()
def latencies(
    models: Sequence[nn.Module], images: torch.Tensor, seconds: float = 2.0
) -> list[float]:
    """Median seconds of a forward pass of each model's deployment form on ``images`` (N, 3, H, W).

    The models take turns, so that load on the machine affects all of them equally. After one
    warm-up round, at least 5 rounds are timed, and more until ``seconds`` have passed.
    """
    tasks = []
    for model in models:
        layout = layout_for(model, images[:1])
        deployed = deploy(model, images[:1])
        tasks.append(functools.partial(deployed, images.contiguous(memory_format=layout)))
    return in_turns(tasks, images.device, seconds)


def in_turns(
    tasks: Sequence[Callable[[], object]], device: torch.device, seconds: float = 2.0
) -> list[float]:
    """Median seconds of each task; they take turns, as `latencies` says."""
    for task in tasks:
        task()
    times: list[list[float]] = [[] for _ in tasks]
    start = now(device)
    while len(times[0]) < 5 or (time.perf_counter() - start < seconds and len(times[0]) < 200):
        for task, taken in zip(tasks, times, strict=True):
            begin = now(device)
            task()
            taken.append(now(device) - begin)
    return [statistics.median(taken) for taken in times]
