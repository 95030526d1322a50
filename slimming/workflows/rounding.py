"""--round-to: the multiples of channels that layers keep."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import nn

from slimming.channels.groups import Group
from slimming.measuring import layer_times, profiling
from slimming.measuring.layer_times import LayerShape
from slimming.measuring.rounding import MULTIPLES, fastest
from slimming.pruning.allocation import Prunable
from slimming.pruning.choice import Choice, Multiples
from slimming.settings import count, setting
from slimming.workflows.budgets import BudgetSettings

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


def round_to_field() -> Any:
    """The field of the multiple, or "auto"."""
    text = "round the number of channels in each layer up to a multiple of N; auto: for each layer "
    text += "the multiple that is fastest on this device, measured with --latency-batch images"
    return setting(1, text, metavar="N", parse=_multiple)


def measured(
    model: nn.Module,
    coupled: list[Group],
    choose: Callable[[Multiples], Choice],
    images: torch.Tensor,
    budget: BudgetSettings,
) -> dict[str, int]:
    """The multiple with which the layers of each group are fastest on the device of ``images``
    (N, 3, H, W), see `slimming.measuring.rounding.fastest`; prints them.

    ``choose(multiples)`` are the channels of ``model`` to keep at the ratio to measure at;
    ``budget`` gives the number of images, and whether more channels are free if they cost no time.
    """

    def cost(shapes: Iterable[LayerShape]) -> Mapping[LayerShape, float]:
        return layer_times.seconds(shapes, budget.latency_batch, images.device)

    def whole(several: Sequence[Multiples]) -> list[float]:
        slims = [Prunable(model, coupled).slim(choose(multiples))[0] for multiples in several]
        batch = images[torch.arange(budget.latency_batch, device=images.device) % len(images)]
        return profiling.latencies([slim.to(images.device) for slim in slims], batch)

    choices = {multiple: choose(multiple) for multiple in MULTIPLES}
    calls = layer_times.calls(model, tuple(images.shape[1:]))
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
