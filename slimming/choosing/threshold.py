"""Which channels are kept: a choice, and the paper's, by one threshold on |γ| over the network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from slimming.channels.scaling import (
    Masks,
    alive_channels,
    present_channels,
    scaling_factors,
)
from slimming.errors import UserError

LEAST = 0.1  # of its channels a layer keeps, where nobody asks for less: benchmarks/defaults.py
Multiples = int | Mapping[str, int]  # of all groups, or by name; a group without an entry has 1


@dataclass(frozen=True)
class Choice:
    """The channels that each group keeps, by its name: ``kept``, a subset of ``alive``.

    ``ratio`` is the requested fraction (0 to 1) to prune, ``threshold`` the largest pruned score
    (|γ|, or that of another measure). ``rescued`` names layers of groups that would have lost
    more channels and keep only the least number of them, their best ones; ``spared`` counts the
    channels that are kept only to round up to a multiple.
    """

    ratio: float
    threshold: float
    alive: Masks
    kept: Masks
    rescued: list[str]
    spared: int = 0

    @property
    def channels(self) -> tuple[int, int]:
        """The number of alive channels before and after pruning."""
        return sum(int(a.sum()) for a in self.alive.values()), sum(
            int(k.sum()) for k in self.kept.values()
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


def alive_factors(model: nn.Module, without: Masks | None = None) -> torch.Tensor:
    """|γ| of all alive channels, ``without`` some, as one vector in fp32 on the CPU."""
    factors, alive = scaling_factors(model), alive_channels(model)
    left = [factors[n][alive[n] & ~without[n] if without else alive[n]] for n in factors]
    return torch.cat([torch.zeros(0), *left])


def sorted_factors(model: nn.Module, without: Masks | None = None) -> torch.Tensor:
    """The `alive_factors`, sorted. UserError if there are none, or not all of them are finite."""
    found = alive_factors(model, without).sort().values
    if not len(found) and without:
        return sorted_factors(model)[:1]
    if not len(found) or not found.isfinite().all():
        raise UserError(
            "the scaling factors of the network are not finite, or it has none: prune a "
            "checkpoint with BatchNorm of a run that did not diverge"
        )
    return found


def choose_channels(
    model: nn.Module,
    ratio: float,
    at_least_one: bool = True,
    round_to: Multiples = 1,
    least: float = 0.0,
) -> Choice:
    """Choose the channels to keep when the fraction ``ratio`` (0 <= ratio < 1) of those alive is
    pruned (Liu et al., ICCV 2017, section 3).

    The threshold is the value at position int(total · ratio) of the `sorted_factors`; `keep_above`
    it. With ``least`` (0 to 1) each layer keeps that fraction of its channels, those with the
    largest |γ|, see `least_of`, and the threshold is a value of the other channels. UserError if a
    scaling factor is not finite, or the ratio is out of range.
    """
    if not 0 <= ratio < 1:
        raise UserError(f"ratio must be at least 0 and less than 1, not {ratio}")
    ranked = sorted_factors(model)
    place, stays = int(len(ranked) * ratio), None
    if least:
        factors, alive = scaling_factors(model), alive_channels(model)
        stays = {n: _largest(factors[n], alive[n], ratio, least) for n in factors}
        ranked = sorted_factors(model, stays)
    threshold = float(ranked[min(place, len(ranked) - 1)])
    return keep_above(model, threshold, ratio, at_least_one, round_to, stays)


def keep_above(
    model: nn.Module,
    threshold: float,
    ratio: float,
    at_least_one: bool = True,
    round_to: Multiples = 1,
    stays: Masks | None = None,
) -> Choice:
    """Keep the channels whose |γ| is strictly greater than ``threshold``, and those that ``stays``.

    Masks have the name of their BN, like the groups of the paper's networks. With ``at_least_one``
    a layer that would lose every channel keeps its largest |γ|. With ``round_to`` each layer keeps
    more channels, the largest first, up to a multiple of it (or all that are alive). A BN without γ
    keeps its channels. ``ratio`` is what was asked for, for reports.
    """
    factors, alive = scaling_factors(model), alive_channels(model)
    above = {name: alive[name] & (factors[name] > threshold) for name in factors}
    keep = {name: mask | stays[name] if stays else mask for name, mask in above.items()}
    keep = keep_one(model, keep) if at_least_one else keep
    rescued = [name for name, mask in keep.items() if (mask & ~above[name]).any()]
    rounded = {
        name: round_up(mask, factors[name], alive[name], multiple_of(round_to, name))
        for name, mask in keep.items()
    }
    spared = sum(int(rounded[n].sum() - mask.sum()) for n, mask in keep.items())
    return Choice(ratio, threshold, alive, {**alive, **rounded}, rescued, spared)


def _largest(
    factors: torch.Tensor, alive: torch.Tensor, ratio: float, least: float
) -> torch.Tensor:
    """The mask of the alive channels with the largest ``factors`` that stay, see `least_of`."""
    count = min(int(alive.sum()), least_of(least, int(alive.sum()), ratio))
    best = factors.masked_fill(~alive, -1).argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(alive).index_fill_(0, best, True)


def keep_one(model: nn.Module, keep: Masks) -> Masks:
    """``keep``, plus the channel with the largest |γ| in each layer that would keep none."""
    factors, present = scaling_factors(model), present_channels(model)
    keep = {name: mask.clone() for name, mask in keep.items()}
    for name, mask in keep.items():
        if not mask.any():
            mask[factors[name].masked_fill(~present[name], -1).argmax()] = True
    return keep


NEAR_ZERO = 1e-2


def near_zero(model: nn.Module) -> float:
    """The fraction of channels with |γ| below NEAR_ZERO."""
    factors = alive_factors(model)
    return float((factors < NEAR_ZERO).sum()) / max(1, len(factors))
