"""How a fraction of the channels is allocated to layers: which layer loses how many of them.

Within a layer the channels with the smallest scaling factors go; LAMP ranks them by their weights.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from slimming.channels.groups import Group, count_filters, lists_widths
from slimming.channels.scaling import alive_channels
from slimming.choosing import importance, ranking
from slimming.choosing.importance import Evidence, Scores, scaled_norms
from slimming.choosing.threshold import Choice, Multiples, choose_channels
from slimming.errors import UserError

LEAST = 1e-3  # a smaller share is none
RANDOM = re.compile(r"random-(\d{1,9})")


@dataclass(frozen=True)
class Prunable:
    """A network, the groups of its coupled channels that can be removed, the multiples that layers
    keep, and the fraction ``least`` of its channels that each layer keeps (see `least_of`).
    Without ``at_least_one``, one of the paper's networks may lose whole layers to the threshold."""

    model: nn.Module
    coupled: list[Group]
    round_to: Multiples = 1
    at_least_one: bool = True
    least: float = 0.0  # as in the paper: one channel

    @property
    def total(self) -> int:
        """The number of channels that can be removed."""
        if lists_widths(self.model):
            return sum(int(mask.sum()) for mask in alive_channels(self.model).values())
        return count_filters(self.coupled)

    @cached_property
    def alive_groups(self) -> list[Group]:
        """The groups, without the channels that a mask has set to γ = β = 0."""
        if not lists_widths(self.model):
            return self.coupled
        masks = alive_channels(self.model)
        alive = {name: mask for name, mask in masks.items() if mask.any()}
        return [
            replace(g, alive=alive[g.name], filters=g.filters * alive[g.name])
            if g.name in alive
            else g
            for g in self.coupled
        ]

    @cached_property
    def scores(self) -> Scores:
        """|γ|, or ‖θ‖₁ of each filter if there is no BatchNorm."""
        measure = "bn" if scaled_norms(self.model) else "l1"
        return importance.MEASURES[measure](Evidence(self.model, []))

    @cached_property
    def lamp_scores(self) -> Scores:
        """The LAMP score of each filter."""
        return importance.MEASURES["lamp"](Evidence(self.model, []))

    def ranked(
        self, ratio: float, scores: Scores | None = None, shares: Mapping[str, float] | None = None
    ) -> Choice:
        """The channels with the highest ``scores``; ``shares``: see `ranking.choose`."""
        scores = self.scores if scores is None else scores
        return ranking.choose(
            self.alive_groups,
            scores,
            ratio,
            shares=shares,
            round_to=self.round_to,
            least=self.least,
        )


Allocation = Callable[[Prunable, float], Choice]


def global_(network: Prunable, ratio: float) -> Choice:
    """One threshold on |γ| over the whole network (Liu et al., ICCV 2017, section 3)."""
    if lists_widths(network.model):
        return choose_channels(
            network.model, ratio, network.at_least_one, network.round_to, network.least
        )
    if not scaled_norms(network.model):
        raise UserError("the network has no BatchNorm, so no threshold on its scaling factors")
    return network.ranked(ratio)


def uniform(network: Prunable, ratio: float) -> Choice:
    """The same fraction of each layer."""
    return network.ranked(ratio, shares=dict.fromkeys(_names(network), 1.0))


def lamp(network: Prunable, ratio: float) -> Choice:
    """Layer-adaptive: one threshold on the LAMP score (Lee et al., ICLR 2021, 2010.07611)."""
    return replace(network.ranked(ratio, network.lamp_scores), threshold=math.nan)  # no |γ|


ALLOCATIONS: dict[str, Allocation] = {"global": global_, "uniform": uniform, "lamp": lamp}


def choose(network: Prunable, ratio: float, name: str = "global") -> Choice:
    """Prune the fraction ``ratio`` (0 <= ratio < 1) of the channels by the allocation ``name``: one
    of `ALLOCATIONS`, or random-N, which draws the fractions of the layers with the seed N.
    UserError for another ratio or name."""
    drawn = RANDOM.fullmatch(name)
    if drawn:
        return network.ranked(ratio, shares=random_shares(_names(network), int(drawn[1])))
    if name not in ALLOCATIONS:
        raise UserError(f"unknown allocation {name!r}: use {', '.join(ALLOCATIONS)} or random-N")
    return ALLOCATIONS[name](network, ratio)


def random_shares(names: list[str], seed: int) -> dict[str, float]:
    """A share for each group, uniform from 0 to 1, as in the candidates of EagleEye (Li et al.,
    ECCV 2020, 2007.02491)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(names), generator=generator, dtype=torch.double).clamp(min=LEAST)
    return dict(zip(names, drawn.tolist(), strict=True))


def _names(network: Prunable) -> list[str]:
    return [group.name for group in network.coupled]


def allocation_name(text: str) -> str:
    """The name of an allocation, for `choose`."""
    if text not in ALLOCATIONS and not RANDOM.fullmatch(text):
        raise ValueError(f"must be {', '.join(ALLOCATIONS)} or random-N, not {text!r}")
    return text
