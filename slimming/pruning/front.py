"""The best of many slim networks: the front of cost and accuracy, and its knee."""

from collections.abc import Sequence

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
