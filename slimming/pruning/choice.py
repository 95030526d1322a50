"""The channels to keep."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from slimming.channels.scaling import Masks

LEAST = 0.1  # of its channels a layer keeps, where nobody asks for less: benchmarks/defaults.py
Multiples = int | Mapping[str, int]  # of all groups, or by name; a group without an entry has 1


@dataclass(frozen=True)
class Choice:
    """The channels that each group keeps, by its name: ``keep``, a subset of ``alive``.

    ``ratio`` is the requested fraction (0 to 1) to prune, ``threshold`` the largest pruned score
    (|γ|, or that of another measure). ``rescued`` names layers of groups that would have lost
    more channels and keep only the least number of them, their best ones; ``spared`` counts the
    channels that are kept only to round up to a multiple.
    """

    ratio: float
    threshold: float
    alive: Masks
    keep: Masks
    rescued: list[str]
    spared: int = 0

    @property
    def channels(self) -> tuple[int, int]:
        """The number of alive channels before and after pruning."""
        return sum(int(a.sum()) for a in self.alive.values()), sum(
            int(k.sum()) for k in self.keep.values()
        )


def least_of(least: float, channels: int, ratio: float = 0.0) -> int:
    """How many of its ``channels`` a layer keeps at least: the fraction ``least`` (0 to 1), or
    1 - ``ratio`` if more than 1 - ``least`` is to be pruned; never none.

    >>> least_of(0.1, 64), least_of(0.1, 64, ratio=0.95), least_of(0.0, 64)
    (7, 4, 1)
    """
    return max(1, math.ceil(min(least, 1 - ratio) * channels - 1e-9))


def multiple_of(round_to: Multiples, name: str) -> int:
    """The multiple to which the group ``name`` is rounded up."""
    return round_to if isinstance(round_to, int) else round_to.get(name, 1)


def round_up(
    keep: torch.Tensor, factors: torch.Tensor, alive: torch.Tensor, multiple: int
) -> torch.Tensor:
    """``keep``, plus the alive channels with the largest ``factors`` up to the next multiple."""
    missing = -int(keep.sum()) % multiple
    others = factors.masked_fill(keep | ~alive, -1)
    more = others.argsort(descending=True, stable=True)[:missing]
    rounded = keep.clone()
    rounded[more[others[more] >= 0]] = True
    return rounded
