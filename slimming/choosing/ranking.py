"""Choose channels by their scores, in one ranking over the network or in one per group."""

import math
from collections.abc import Mapping

import torch

from slimming.channels.groups import Group
from slimming.channels.scaling import Masks
from slimming.choosing.importance import Scores
from slimming.choosing.threshold import Choice, Multiples, least_of, multiple_of, round_up
from slimming.errors import UserError


def choose(
    coupled: list[Group],
    scores: Scores,
    ratio: float,
    *,
    local: bool = False,
    shares: Mapping[str, float] | None = None,
    round_to: Multiples = 1,
    least: float | Mapping[str, int] = 0.0,
) -> Choice:
    """Choose the units of each group to keep when the fraction ``ratio`` of all filters is pruned:
    over the whole network or, with ``local``, of each group. With ``shares``, by the names of the
    groups, the fractions of the groups are in these proportions.

    The score of a unit is the mean over the layers of its group that have scores; ties are spread
    evenly over all groups. Groups without scores are not pruned. Each layer that writes a group
    keeps the fraction ``least`` (0 to 1) of its channels, see `threshold.least_of`, or
    ``least[name]`` channels, its best ones and at least one; each group keeps a multiple of
    ``round_to`` units (or all that are alive). ``rescued`` names the first layer of each group of
    which nothing more could be pruned. UserError if no group has scores, or one is not finite.
    """
    _check(ratio, round_to, least)
    found = {group.name: _unit_scores(group, scores) for group in coupled}
    by_group = {name: units for name, units in found.items() if units is not None}
    scored = [group for group in coupled if group.name in by_group]
    if not scored:
        raise UserError(
            "no layer can be pruned: this measure scores none of them, use another one"
            if coupled
            else "no layer can be pruned: all layers are ignored or write the logits"
        )
    if not all(by_group[group.name][group.alive].isfinite().all() for group in scored):
        raise UserError(
            "some importance scores are not finite: check whether the training diverged"
        )
    alive = {group.name: group.alive for group in scored}
    prunable = {g.name: g.alive & ~_best(g, by_group[g.name], ratio, least) for g in scored}
    if local:
        cuts, threshold = _lowest_of_each(scored, by_group, prunable, ratio), math.nan
    elif shares is not None:
        # the larger the share, the more units are below the same fraction; each at its middle
        places = {
            g.name: (_places(by_group[g.name], g.alive) + 0.5 / int(g.alive.sum())) / shares[g.name]
            for g in scored
        }
        cuts, threshold = _lowest_of_all(scored, places, prunable, ratio)[0], math.nan
    else:
        cuts, threshold = _lowest_of_all(scored, by_group, prunable, ratio)
    keep, rescued, spared = {}, [], 0
    for group in scored:
        units, name = by_group[group.name], group.name
        shifted = units - units.min()  # `round_up` needs scores of at least 0
        keep[name] = round_up(
            alive[name] & ~cuts[name], shifted, alive[name], multiple_of(round_to, name)
        )
        more = int((keep[name] & cuts[name]).sum())
        if cuts[name].any() and torch.equal(cuts[name], prunable[name]) and not more:
            rescued.append(group.members[0].layer)
        spared += more
    return Choice(ratio, threshold, alive, keep, rescued, spared)


def _check(ratio: float, round_to: Multiples, least: float | Mapping[str, int]) -> None:
    """UserError if an argument of `choose` is out of range."""
    multiples = [round_to] if isinstance(round_to, int) else list(round_to.values())
    if not 0 <= ratio < 1 or min(multiples, default=1) < 1:
        raise UserError(
            f"ratio must be at least 0 and less than 1, not {ratio}, and round_to at least 1, not "
            f"{round_to}"
        )
    if isinstance(least, float | int) and not 0 <= least <= 1:
        raise UserError(f"least must be between 0 and 1, not {least}")


def _unit_scores(group: Group, scores: Scores) -> torch.Tensor | None:
    """The mean score of each unit (size,) over the layers of a group, infinite for units that are
    not alive; None if an alive unit has no score."""
    sums = torch.zeros(group.size, dtype=torch.double)
    layers = torch.zeros(group.size)  # number of scores: a layer may lack channels of some units
    for member in group.members:
        key = f"{member.layer}:in" if member.side == "in" else member.layer
        if key in scores:
            if len(scores[key]) <= member.channels.max():
                raise UserError(f"there are only {len(scores[key])} scores for {key}: pass more")
            own = scores[key].detach().double().cpu()[member.channels]
            count = torch.bincount(member.units, minlength=group.size)
            sums += torch.zeros_like(sums).index_add_(0, member.units, own) / count.clamp(min=1)
            layers += count > 0
    if not layers[group.alive].all():
        return None
    return (sums / layers).masked_fill(~group.alive, math.inf)


def _best(
    group: Group, units: torch.Tensor, ratio: float, least: float | Mapping[str, int]
) -> torch.Tensor:
    """A mask of the best units of each layer of a group, which stay: in a concatenation, each layer
    writes only some of the units."""
    best = torch.zeros(group.size, dtype=torch.bool)
    for member in group.members:
        own = member.units[group.alive[member.units]].unique()
        if member.side == "in":
            count = 1
        elif isinstance(least, Mapping):
            count = least.get(member.layer, 1)
        else:
            count = least_of(least, len(own), ratio)
        best[own[units[own].argsort(descending=True, stable=True)[:count]]] = True
    return best


def _lowest_of_each(scored: list[Group], by_group: Scores, prunable: Masks, ratio: float) -> Masks:
    """Masks of the fraction ``ratio`` with the lowest scores in each group."""
    cuts = {}
    for group in scored:
        order = by_group[group.name].argsort(stable=True)
        count = int(int(group.alive.sum()) * ratio + 1e-9)
        removed = order[prunable[group.name][order]][:count]
        cuts[group.name] = torch.zeros(group.size, dtype=torch.bool).index_fill_(0, removed, True)
    return cuts


def _lowest_of_all(
    scored: list[Group], by_group: Scores, prunable: Masks, ratio: float
) -> tuple[Masks, float]:
    """Masks of the lowest scores over all groups that make up the fraction ``ratio`` of the
    filters, and the highest of these scores."""
    ranking = torch.cat([by_group[group.name] for group in scored])
    place = torch.cat([_places(by_group[group.name], group.alive) for group in scored])
    filters = torch.cat([group.filters for group in scored])
    order = place.argsort(stable=True)  # break ties by the rank within the group
    order = order[ranking[order].argsort(stable=True)]
    order = order[torch.cat([prunable[group.name] for group in scored])[order]]
    removed = order[filters[order].cumsum(0) <= ratio * int(filters.sum()) + 1e-9]
    cut = torch.zeros(len(ranking), dtype=torch.bool).index_fill_(0, removed, True)
    parts = cut.split([group.size for group in scored])
    threshold = float(ranking[removed].max()) if len(removed) else -math.inf
    return {group.name: part for group, part in zip(scored, parts, strict=True)}, threshold


def _places(units: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """The rank of each alive unit in its group, scaled to [0, 1)."""
    return units.argsort(stable=True).argsort() / int(alive.sum())
