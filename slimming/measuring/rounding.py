"""The multiples to which numbers of channels are rounded up, by what is fastest on this device."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from slimming.channels.groups import Group
from slimming.measuring.layer_times import LayerShape
from slimming.pruning.choice import Choice

MULTIPLES = (1, 2, 4, 8, 16, 32)
NOISE = 0.01  # smaller relative differences of two times are noise

Times = Mapping[LayerShape, float]
Cost = Callable[[Iterable[LayerShape]], Times]  # see `layer_times.seconds`
Whole = Callable[[Sequence[Mapping[str, int]]], Sequence[float]]


def fastest(
    coupled: list[Group],
    choices: Mapping[int, Choice],
    calls: list[tuple[str, LayerShape]],
    cost: Cost,
    whole: Whole,
    *,
    limited: bool = False,
    fewest: bool = False,
) -> dict[str, int]:
    """The multiple for each group of ``coupled`` channels with which the layers that write and read
    it take the least time, by the name of the group.

    ``choices`` are those of the channels to keep at the same ratio, one for each multiple;
    ``calls`` the layers of the dense network, see `layer_times.calls`; ``cost`` measures
    them, and ``whole`` the slim networks with several sets of multiples, in seconds.

    First, all groups get the same multiple, that of the fastest network: kernels may need aligned
    channels on both sides, and much of the time may be spent outside of layers. From there each
    group tries the other multiples, its neighbours unchanged. If the network with all these changes
    is slower than without, none is made. So no single multiple is faster than the result by more
    than 2 NOISE: a layer changes with the group that it reads and the one that it writes.

    Of the multiples that are as fast as the fastest one, up to NOISE, a group gets the largest: it
    keeps at least as many channels, and those that cost no time are better kept, because the slim
    network is then closer to the dense one. They do cost FLOPs and parameters; for a budget on
    these, ``fewest`` takes the smallest multiple instead. For any budget, ``limited`` takes no
    multiple above the number of channels that a group keeps without rounding: then a network in
    which each group keeps one multiple is no larger, so that pruning more meets the budget.
    """
    network = _Rounded(coupled, choices, calls, limited)
    uniform = {m: network.limited(dict.fromkeys(network.groups, m)) for m in choices}
    totals = dict(zip(uniform, whole(list(uniform.values())), strict=True))
    sign = 1 if fewest else -1
    start = uniform[min(totals, key=lambda multiple: (totals[multiple], sign * multiple))]
    tried = {
        name: {m: network.shapes({**start, name: m}, name) for m in network.groups[name]}
        for name in network.groups
    }
    times = cost(s for shapes in tried.values() for some in shapes.values() for s in some)
    mixed = {}
    for name, shapes in tried.items():
        taken = {m: sum(times[shape] for shape in some) for m, some in shapes.items()}
        equal = [m for m in taken if taken[m] <= (1 + NOISE) * min(taken.values())]
        mixed[name] = min(equal) if fewest else max(equal)
    before, after = whole([start, mixed])
    return network.named(mixed if after <= (1 + 2 * NOISE) * before else start)


class _Rounded:
    """The layers of a slim network, for any multiple of each of its ``groups``: the multiples that
    each may have, by its name."""

    def __init__(
        self,
        coupled: list[Group],
        choices: Mapping[int, Choice],
        calls: list[tuple[str, LayerShape]],
        limited: bool,
    ):
        self.calls, self.choices = calls, choices
        keep = {m: choice.keep for m, choice in choices.items()}
        pruned = [group for group in coupled if all(group.name in masks for masks in keep.values())]
        kept = {group.name: int(keep[1][group.name].sum()) for group in pruned}
        self.groups = {
            name: [m for m in sorted(keep) if m <= max(1, count) or not limited]
            for name, count in kept.items()
        }
        # layer -> (group, side, multiple -> number of channels that it loses)
        self.removed: dict[str, list[tuple[str, str, dict[int, int]]]] = {}
        for group in pruned:
            for member in group.members:
                lost = {m: int((~keep[m][group.name][member.units]).sum()) for m in keep}
                self.removed.setdefault(member.layer, []).append((group.name, member.side, lost))

    def limited(self, multiples: Mapping[str, int]) -> dict[str, int]:
        """The largest multiple of each group that is no larger than the given one."""
        return {n: max(m for m in self.groups[n] if m <= multiples[n]) for n in multiples}

    def shapes(self, multiples: Mapping[str, int], group: str) -> list[LayerShape]:
        """The layers that write or read the ``group``, if each group keeps its multiple."""
        found = []
        for name, dense in self.calls:
            parts = self.removed.get(name, [])
            if group not in [part[0] for part in parts]:
                continue
            less = {"in": 0, "out": 0}
            for part, side, counts in parts:
                less[side] += counts[multiples[part]]
            found.append(_narrower(dense, less["in"], less["out"]))
        return found

    def named(self, multiples: Mapping[str, int]) -> dict[str, int]:
        """For each group, the multiple to report for its number of channels: of all multiples that
        give this number, the largest that divides it, else the smallest."""
        names = {}
        for group, multiple in multiples.items():
            counts = {m: int(choice.keep[group].sum()) for m, choice in self.choices.items()}
            count = counts[multiple]
            same = [m for m in self.groups[group] if counts[m] == count]
            names[group] = max((m for m in same if count % m == 0), default=same[0])
        return names


def _narrower(dense: LayerShape, unread: int, unwritten: int) -> LayerShape:
    """A layer without these numbers of channels, but with at least one in each of its groups."""
    if dense.groups == dense.reads == dense.writes > 1:  # depthwise
        left = max(1, dense.writes - unwritten)
        return replace(dense, reads=left, writes=left, groups=left)
    reads, writes = dense.reads - unread, dense.writes - unwritten
    return replace(dense, reads=max(dense.groups, reads), writes=max(dense.groups, writes))
