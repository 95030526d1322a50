"""How large and how fast networks are: parameters, FLOPs, bytes, latency."""

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimming.channels import inputs as arguments
from slimming.channels.groups import copied
from slimming.channels.inputs import Inputs
from slimming.choosing.importance import layers
from slimming.deploy.fold import deploy
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


BATCHES = (1, 64)  # batch sizes at which latency is measured

KEYS = {  # field -> key in metrics.json
    "top1": "top-1",
    "loss": "loss",
    "parameters": "parameters",
    "effective_parameters": "effective parameters",
    "flops": "FLOPs",
    "effective_flops": "effective FLOPs",
    "bytes": "bytes",
}
UNTESTED = (None, None)


@dataclass(frozen=True)
class Figures:
    """Cost and accuracy of a network.

    parameters: weights; the masks of channel selection are not counted
    flops: FLOPs (2 x multiply-accumulates) of the convolutions and linear layers for one image
    effective_parameters, effective_flops: the same without weights that are exactly zero, the
        cost for a program that skips them
    bytes: size of the weights on disk, without an optimizer
    latency: batch size -> median seconds of a forward pass of the deployment form
    top1: fraction of the test images, 0 to 1; None if the network was not tested
    loss: mean cross entropy in nats; None if the network was not tested
    """

    parameters: int
    effective_parameters: int
    flops: int
    effective_flops: int
    bytes: int
    latency: Mapping[int, float] = field(default_factory=dict)
    top1: float | None = None
    loss: float | None = None

    def record(self) -> dict:
        """The figures by the keys of metrics.json, without those that were not measured."""
        known = {key: getattr(self, name) for name, key in KEYS.items()}
        latency = {str(batch): seconds for batch, seconds in self.latency.items()}
        known |= {"latency": latency} if latency else {}
        return {key: value for key, value in known.items() if value is not None}

    def answer(self) -> dict[str, float]:
        """Size, and latency in milliseconds, by the keys of eval.py --json."""
        names = (*Counts._fields, "bytes")
        sizes = {KEYS[name].replace(" ", "_"): getattr(self, name) for name in names}
        return sizes | {f"latency_{n}_ms": 1e3 * seconds for n, seconds in self.latency.items()}


def measure(
    models: Sequence[nn.Module],
    images: torch.Tensor,
    batches: Sequence[int] = (),
    scores: Sequence[tuple[float | None, float | None]] = (),
) -> list[Figures]:
    """The figures of each network.

    ``images`` (N, C, H, W) have the input size of the networks. ``batches``: the batch sizes at
    which latency is measured, with the first of the ``images``; the networks take turns, on the
    device of ``images``. ``scores``: (loss, top-1) of each network, as
    `slimming.training.loop.test` returns them.

    >>> layer = nn.Conv2d(3, 8, 3, bias=False)
    >>> (figures,) = measure([layer], torch.zeros(1, 3, 32, 32))
    >>> figures.parameters, figures.flops
    (216, 388800)
    """
    latencies = latency_by_batch(models, images, batches)
    scores = scores or [UNTESTED] * len(models)
    return [
        Figures(
            **count_all(model, tuple(images.shape[1:]))._asdict(),
            bytes=count_bytes(model),
            latency=latency,
            top1=top1,
            loss=loss,
        )
        for model, latency, (loss, top1) in zip(models, latencies, scores, strict=True)
    ]


def latency_by_batch(
    models: Sequence[nn.Module], images: torch.Tensor, batches: Sequence[int] = BATCHES
) -> list[dict[int, float]]:
    """For each network, batch size -> median seconds, see `latencies`.

    ValueError if a batch is larger than ``images``.
    """
    if max(batches, default=0) > len(images):
        raise ValueError(f"a batch of {max(batches)} needs more than {len(images)} images")
    found: list[dict[int, float]] = [{} for _ in models]
    for batch in batches:
        times = latencies(models, images[:batch])
        for latency, seconds in zip(found, times, strict=True):
            latency[batch] = seconds
    return found
