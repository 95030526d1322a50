"""Which of many slim networks: the smallest ratio that fits a budget; the front, and its knee."""

from collections.abc import Callable, Mapping, Sequence
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


NOISE = 0.01  # about a standard error of the accuracy on 1,024 images

Point = tuple[float, float]  # cost, accuracy


def front(points: Sequence[Point]) -> list[int]:
    """The indices of the points that no other one beats: none has a higher accuracy at the same
    cost or less. By rising cost.

    >>> front([(0.2, 0.5), (0.3, 0.4), (0.5, 0.9)])
    [0, 2]
    """
    best: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not best or points[i][1] > points[best[-1]][1]:
            best.append(i)
    return best


def knee(points: Sequence[Point], dense: Point) -> int:
    """The index of the point of the `front` that is farthest above the line from its cheapest point
    to the ``dense`` network, in units of their differences: beyond it, accuracy falls faster than
    cost (Satopää et al., 2011, "Finding a kneedle in a haystack"). Accuracy above that of the dense
    network counts as equal; if the cheapest point is as accurate, up to NOISE, it is the knee.

    >>> knee([(0.1, 0.1), (0.3, 0.85), (0.6, 0.9)], dense=(1.0, 0.9))
    1
    """
    best = front(points)
    low_cost, low_accuracy = points[best[0]]
    width, height = dense[0] - low_cost, dense[1] - low_accuracy
    if width <= 0 or height <= NOISE:
        return best[0]

    def above(i: int) -> float:
        cost, accuracy = points[i]
        return (min(accuracy, dense[1]) - low_accuracy) / height - (cost - low_cost) / width

    return max(best, key=above)
