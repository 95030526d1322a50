"""How much is pruned, and how: flags of allocation, budgets, multiples of channels, repair."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Literal

import torch
from torch import nn

from slimming.channels.groups import Group
from slimming.channels.scaling import Masks
from slimming.choosing import allocation, budget
from slimming.choosing.allocation import Prunable, allocation_name
from slimming.choosing.threshold import Choice, Multiples
from slimming.data.loading import Data
from slimming.errors import UserError
from slimming.measuring import figures, latency
from slimming.measuring.latency import MULTIPLES, LayerShape, fastest
from slimming.repair.layer_by_layer import Repaired, repair
from slimming.repair.streaming import FEWEST
from slimming.settings import count, number, seed, setting
from slimming.slicing.slim import slim_to


def allocation_field(default: str | None, more: str = "") -> Any:
    """The field of how the fraction to prune is allocated to the layers."""
    text = "which layers lose the channels with the smallest |γ|: global, one threshold over the "
    text += "network; uniform, all alike; lamp, by LAMP scores; random-N, a candidate of sweep.py"
    return setting(default, text + more, metavar="A", parse=allocation_name)


def least_field(default: float) -> Any:
    """The field of the fraction of its channels that each layer keeps."""
    text = "each layer keeps at least this fraction of its channels, or 1 - P if that is less"
    text += "; 0: one channel"
    text += "" if default else ", as in the paper"
    return setting(default, text, metavar="F", parse=number(float, 0, 1))


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
            choice = allocation.choose(prunable, ratio, name)
            return slim_to(prunable.model, prunable.coupled, choice.kept)[0]

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
        full = figures.count_all(dense, tuple(images.shape[1:]))
        fitting = budget.smallest_fit(
            prune, lambda slim: self._costs(slim, dense, full, images), self.given, total
        )
        text = [f"{n} {fitting.costs[n]:.4g} (limit {v:g})" for n, v in self.given.items()]
        label = ", ".join(["budget", *notes])
        print(f"{label}: {fitting.ratio:.2%} of the channels are pruned: {', '.join(text)}")
        return fitting.ratio

    def _costs(
        self, slim: nn.Module, dense: nn.Module, full: figures.Counts, images: torch.Tensor
    ) -> dict[str, float]:
        """What ``slim`` costs, by flag; ``full`` are the counts of the ``dense`` network."""
        costs: dict[str, float] = {}
        if self.flops or self.mflops:
            flops = figures.count_flops(slim, images.shape[-1])
            costs |= {"--flops": flops / full.flops, "--mflops": flops / 1e6}
        if self.params or self.mparams:
            count = figures.count_parameters(slim)
            costs |= {"--params": count / full.parameters, "--mparams": count / 1e6}
        if self.latency or self.ms:
            pair = [model.to(images.device) for model in (slim, dense)]
            rows = torch.arange(self.latency_batch, device=images.device) % len(images)
            batch = images[rows]  # small datasets repeat images
            times = [figures.latencies(pair, batch, seconds=0.5) for _ in range(REPEATS)]
            costs["--latency"] = statistics.median(ours / theirs for ours, theirs in times)
            costs["--ms"] = 1e3 * statistics.median(ours for ours, _ in times)
        return costs


@dataclass(frozen=True)
class RepairSettings:
    """Whether a pruned network is repaired, and on how many images."""

    title: ClassVar[str] = "repair"
    repair: bool = setting(
        False,
        "after pruning, fit the remaining weights to reproduce the activations of the dense "
        "network (least squares on training images, no labels, no gradient)",
        kind="switch",
        kept=True,
    )
    repair_images: int = setting(
        2048,
        "number of training images for --repair",
        metavar="N",
        parse=number(int, FEWEST, 10**6),
        kept=True,
    )
    repair_seed: int = setting(
        0, "random seed for choosing these images", metavar="N", parse=seed, kept=True
    )

    def __post_init__(self) -> None:
        for name in ("repair_images", "repair_seed"):
            if not self.repair and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"--{name.replace('_', '-')} needs --repair: add it")

    def repaired(
        self, slim: nn.Module, dense: nn.Module, kept: Mapping[str, Masks], loader: Data
    ) -> Repaired:
        """``slim`` repaired on images of the training ``loader``; prints how well that went."""
        images, _ = loader.draw(self.repair_images, self.repair_seed)
        repaired = repair(slim, dense, dict(kept), images, self.repair_seed)
        for note in repaired.notes:
            print(f"note: {note}")
        warning = "" if repaired.helped else "warning: "
        print(f"{warning}repair on {repaired.images} training images: {repaired}")
        return repaired


AUTO: Final = "auto"
WITHOUT = "without rounding"  # note on the budget that is met before multiples are measured

RoundTo = int | Literal["auto"]


def _multiple(text: str) -> RoundTo:
    if text == AUTO:
        return AUTO
    try:
        return count(text)
    except ValueError:
        raise ValueError(f"must be auto or an integer of at least 1, not {text!r}") from None


def round_to_field(default: RoundTo) -> Any:
    """The field of the multiple, or "auto"."""
    text = "round the number of channels in each layer up to a multiple of N; auto: for each layer "
    text += "the multiple that is fastest on this device, measured with --latency-batch images"
    return setting(default, text, metavar="N", parse=_multiple)


def measured(
    model: nn.Module,
    coupled: list[Group],
    choose: Callable[[Multiples], Choice],
    images: torch.Tensor,
    budget: BudgetSettings,
) -> dict[str, int]:
    """The multiple with which the layers of each group are fastest on the device of ``images``
    (N, 3, H, W), see `slimming.measuring.latency.fastest`; prints them.

    ``choose(multiples)`` are the channels of ``model`` to keep at the ratio to measure at;
    ``budget`` gives the number of images, and whether more channels are free if they cost no time.
    """

    def cost(shapes: Iterable[LayerShape]) -> Mapping[LayerShape, float]:
        return latency.seconds(shapes, budget.latency_batch, images.device)

    def whole(several: Sequence[Multiples]) -> list[float]:
        slims = [slim_to(model, coupled, choose(multiples).kept)[0] for multiples in several]
        batch = images[torch.arange(budget.latency_batch, device=images.device) % len(images)]
        return figures.latencies([slim.to(images.device) for slim in slims], batch)

    choices = {multiple: choose(multiple) for multiple in MULTIPLES}
    calls = latency.calls(model, tuple(images.shape[1:]))
    found = fastest(
        coupled, choices, calls, cost, whole, limited=bool(budget.given), fewest=budget.on_size
    )
    print(f"--round-to {AUTO}: {_text(found, choose(found))}", flush=True)
    return found


def _text(multiples: Mapping[str, int], choice: Choice) -> str:
    """How many layers keep a multiple of what, and how many channels more that is.

    >>> _text({"a": 8, "b": 1, "c": 8}, Choice(0.5, 0.1, {}, {}, [], 12))
    '2 layers keep a multiple of 8, 1 of 1: 12 channels more than without rounding'
    >>> _text({"a": 1, "b": 1}, Choice(0.5, 0.1, {}, {}, [], 0))
    'no layer is rounded: no multiple was faster'
    """
    if set(multiples.values()) == {1}:
        return "no layer is rounded: no multiple was faster"
    layers = sorted(Counter(multiples.values()).items(), reverse=True)
    (first, number), *others = layers
    nouns = "layer keeps" if number == 1 else "layers keep"
    parts = [f"{number} {nouns} a multiple of {first}", *(f"{n} of {m}" for m, n in others)]
    nouns = "channel" if choice.spared == 1 else "channels"
    return f"{', '.join(parts)}: {choice.spared} {nouns} more than without rounding"
