"""Budgets instead of a fraction of the channels: FLOPs, parameters, latency."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import nn

from slimming.errors import UserError
from slimming.measuring import profiling
from slimming.pruning import allocation, budget
from slimming.pruning.allocation import Prunable
from slimming.settings import number, setting

REPEATS = 3  # measurements of latency, of which the median counts
share = number(float, 1e-6, 1)
positive = number(float, 1e-9)


@dataclass(frozen=True)
class BudgetSettings:
    """What the slim network may cost; all budgets that are given hold together."""

    title: ClassVar[str] = "budget, instead of the fraction to prune"
    flops: float | None = setting(
        None, "upper limit on FLOPs, as a fraction of the dense network's", metavar="F", parse=share
    )
    params: float | None = setting(
        None,
        "upper limit on parameters, as a fraction of those of the dense network",
        metavar="F",
        parse=share,
    )
    latency: float | None = setting(
        None,
        "upper limit on latency (deployment form, this device), as a fraction of the dense "
        "network's",
        metavar="F",
        parse=share,
    )
    mflops: float | None = setting(
        None, "upper limit on the FLOPs of one image, in millions", metavar="M", parse=positive
    )
    mparams: float | None = setting(
        None, "upper limit on parameters, in millions", metavar="M", parse=positive
    )
    ms: float | None = setting(
        None,
        "upper limit on the latency of --latency-batch images, in milliseconds",
        metavar="MS",
        parse=positive,
    )
    latency_batch: int = setting(
        64, "batch size for measuring latency", metavar="N", parse=number(int, 1, 2**16)
    )

    @property
    def given(self) -> dict[str, float]:
        """The budgets that are given, by their flag."""
        names = [entry.name for entry in fields(self) if entry.name != "latency_batch"]
        return {f"--{n}": getattr(self, n) for n in names if getattr(self, n) is not None}

    @property
    def on_size(self) -> bool:
        """Whether FLOPs or parameters are limited, not only latency."""
        return not self.given.keys() <= {"--latency", "--ms"}

    def replaces(self, flag: str) -> None:
        """UserError if there is a budget beside the ``flag`` that it replaces."""
        for name in self.given:
            raise UserError(f"{flag} and {name} contradict each other: use one of them")

    def find_ratio_for(
        self, prunable: Prunable, images: torch.Tensor, name: str, *notes: str
    ) -> float:
        """The smallest ratio at which the allocation called ``name`` keeps every budget."""

        def prune(ratio: float) -> nn.Module:
            return prunable.slim(allocation.choose(prunable, ratio, name))[0]

        notes = notes if name == "global" else (name, *notes)
        return self.find_ratio(prunable.model, images, prune, prunable.total, *notes)

    def find_ratio(
        self,
        dense: nn.Module,
        images: torch.Tensor,
        prune: Callable[[float], nn.Module],
        total: int,
        *notes: str,
    ) -> float:
        """The smallest ratio at which ``prune(ratio)``, a network on the CPU, keeps every budget.

        ``images`` (N, 3, H, W) are real ones, on the device that latency is measured on; ``total``
        channels can be pruned. Prints the result, with ``notes`` on what it is for.
        """
        full = profiling.count_all(dense, tuple(images.shape[1:]))
        fitting = budget.smallest_fit(
            prune, lambda slim: self._costs(slim, dense, full, images), self.given, total
        )
        text = [f"{n} {fitting.costs[n]:.4g} (limit {v:g})" for n, v in self.given.items()]
        label = ", ".join(["budget", *notes])
        print(f"{label}: {fitting.ratio:.2%} of the channels are pruned: {', '.join(text)}")
        return fitting.ratio

    def _costs(
        self, slim: nn.Module, dense: nn.Module, full: profiling.Counts, images: torch.Tensor
    ) -> dict[str, float]:
        """What ``slim`` costs, by flag; ``full`` are the counts of the ``dense`` network."""
        costs: dict[str, float] = {}
        if self.flops or self.mflops:
            flops = profiling.count_flops(slim, images.shape[-1])
            costs |= {"--flops": flops / full.flops, "--mflops": flops / 1e6}
        if self.params or self.mparams:
            count = profiling.count_parameters(slim)
            costs |= {"--params": count / full.parameters, "--mparams": count / 1e6}
        if self.latency or self.ms:
            pair = [model.to(images.device) for model in (slim, dense)]
            rows = torch.arange(self.latency_batch, device=images.device) % len(images)
            batch = images[rows]  # small datasets repeat images
            times = [profiling.latencies(pair, batch, seconds=0.5) for _ in range(REPEATS)]
            costs["--latency"] = statistics.median(ours / theirs for ours, theirs in times)
            costs["--ms"] = 1e3 * statistics.median(ours for ours, _ in times)
        return costs
