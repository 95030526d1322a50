"""How large a network is and how fast: parameters, FLOPs, bytes, latency."""

import copy
import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimming.measuring.deploy import deploy
from slimming.runtime.device import LAYOUT
from slimming.storage import checkpoint


def count_parameters(model: nn.Module, masks: bool = False) -> int:
    """Weights of the model. The masks of channel selection are no weights; with ``masks`` they are
    counted too, as the original scripts do."""
    parameters = model.named_parameters()
    return sum(p.numel() for n, p in parameters if masks or not n.endswith("select.indexes"))


def count_flops(model: nn.Module, size: int = 32) -> int:
    """FLOPs (2 x multiply-accumulates) of the convolutions and linear layers for one image.

    ``size``: height and width of the image in pixels.
    """
    still = copy.deepcopy(model).cpu().float().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        still(torch.zeros(1, 3, size, size))
    return counter.get_total_flops()


def count_effective(model: nn.Module, size: int = 32) -> tuple[int, int]:
    """Parameters and FLOPs without weights that are exactly zero: what a program that skips them
    would need. `count_parameters` and `count_flops` are what a plain program needs."""
    still = copy.deepcopy(model).cpu().float().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        still(torch.zeros(1, 3, size, size))
    zeros, flops = 0, counter.get_total_flops()
    by_module = {n.partition(".")[2]: f for n, f in counter.get_flop_counts().items()}
    for name, layer in still.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            missing = int((layer.weight == 0).sum())
            zeros += missing
            flops -= round(sum(by_module.get(name, {}).values()) * missing / layer.weight.numel())
    return count_parameters(model) - zeros, flops


def count_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights on disk, without an optimizer."""
    return len(checkpoint.serialize(model.state_dict()))


@torch.no_grad()
def latencies(models: list[nn.Module], images: torch.Tensor, seconds: float = 2.0) -> list[float]:
    """Median seconds of a forward pass of each model's deployment form on ``images`` (N, 3, H, W).

    The models take turns, so that a busy machine slows all alike; after one warm-up round at
    least 5 rounds are timed, and more until ``seconds`` are over.
    """
    times = [[] for _ in models]
    models = [deploy(model) for model in models]
    images = images.contiguous(memory_format=LAYOUT)
    start = time.perf_counter()
    while len(times[0]) < 6 or (time.perf_counter() - start < seconds and len(times[0]) < 200):
        for model, taken in zip(models, times, strict=True):
            begin = _now(images.device)
            model(images)
            taken.append(_now(images.device) - begin)
    return [statistics.median(taken[1:]) for taken in times]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
