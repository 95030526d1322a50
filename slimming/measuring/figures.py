"""The figures of a network: size, speed and accuracy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from slimming.measuring import profiling

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
        names = (*profiling.Counts._fields, "bytes")
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
            **profiling.count_all(model, tuple(images.shape[1:]))._asdict(),
            bytes=profiling.count_bytes(model),
            latency=latency,
            top1=top1,
            loss=loss,
        )
        for model, latency, (loss, top1) in zip(models, latencies, scores, strict=True)
    ]


def latency_by_batch(
    models: Sequence[nn.Module], images: torch.Tensor, batches: Sequence[int] = BATCHES
) -> list[dict[int, float]]:
    """For each network, batch size -> median seconds, see `profiling.latencies`.

    ValueError if a batch is larger than ``images``.
    """
    if max(batches, default=0) > len(images):
        raise ValueError(f"a batch of {max(batches)} needs more than {len(images)} images")
    latencies: list[dict[int, float]] = [{} for _ in models]
    for batch in batches:
        times = profiling.latencies(models, images[:batch])
        for latency, seconds in zip(latencies, times, strict=True):
            latency[batch] = seconds
    return latencies
