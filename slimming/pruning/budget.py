"""Prune until a network fits a budget: a bisection on how many channels go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from slimming.errors import UserError

Costs = Mapping[str, float]  # by the name of a budget


@dataclass(frozen=True)
class Fit:
    """The ratio that fits a budget, and what the network costs then, by the name of the budget."""

    ratio: float
    costs: Costs


def smallest_fit(
    prune: Callable[[float], nn.Module],
    cost: Callable[[nn.Module], Costs],
    limits: Costs,
    total: int,
) -> Fit:
    """The smallest ratio at which the network that ``prune(ratio)`` makes costs no more than the
    ``limits``, all of them together.

    ``total`` channels can be pruned, and more pruned channels never cost more, so that the search
    takes log2(total) networks. UserError if even the smallest network costs more.
    """

    def costs_of(pruned: int) -> Costs:
        return cost(prune((pruned + 0.5) / total))  # the middle: int(total · ratio) is exact

    def fits(costs: Costs) -> bool:
        return all(costs[name] <= limit for name, limit in limits.items())

    low, high = -1, total - 1  # the former does not fit, the latter does
    best = costs_of(high)
    if not fits(best):
        over = [name for name, limit in limits.items() if best[name] > limit]
        least = ", ".join(f"{name} {best[name]:,.6g} (limit {limits[name]:,.6g})" for name in over)
        raise UserError(f"the budget cannot be met: the smallest slim network needs {least}")
    while high - low > 1:
        middle = (low + high) // 2
        costs = costs_of(middle)
        if fits(costs):
            high, best = middle, costs
        else:
            low = middle
    return Fit((high + 0.5) / total, best)
