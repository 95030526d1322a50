"""The best of many slim networks: the front of cost and accuracy, and its knee."""

from collections.abc import Sequence

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
    cost (Satopää et al., 2011, "Finding a kneedle in a haystack").

    >>> knee([(0.1, 0.1), (0.3, 0.85), (0.6, 0.9)], dense=(1.0, 0.9))
    1
    """
    best = front(points)
    low_cost, low_accuracy = points[best[0]]
    width, height = dense[0] - low_cost, dense[1] - low_accuracy
    if width <= 0 or height <= 0:
        return best[-1]  # the cheapest is as good as the dense network, or the only one

    def above(i: int) -> float:
        cost, accuracy = points[i]
        return (accuracy - low_accuracy) / height - (cost - low_cost) / width

    return max(best, key=above)
