"""Which channels stay, by their scores: one ranking over the network, or one in each group."""

import math
from collections.abc import Mapping

import torch

from slimming.errors import UserError
from slimming.pruning.choice import Choice, round_up
from slimming.pruning.coupling import Group
from slimming.pruning.importance import Scores
from slimming.pruning.scaling import Masks


def choose(
    coupled: list[Group],
    scores: Scores,
    ratio: float,
    *,
    local: bool = False,
    round_to: int = 1,
    least: Mapping[str, int] | None = None,
) -> Choice:
    """The units of each group that stay when the share ``ratio`` of all filters goes.

    The score of a unit is the mean over the layers of its group that have one; units of equal score
    go from all groups alike. Groups without a score stay whole, and each layer that writes a group
    keeps its best channel, or as many as ``least`` has under its name. ``rescued`` are the first
    layers of the groups that keep no more than that. UserError if there is none with a score, or
    one is not finite.
    """
    if not 0 <= ratio < 1 or round_to < 1:
        raise UserError(
            f"the ratio must be from 0 to below 1, not {ratio}, and round_to at least 1"
        )
    found = {group.name: _unit_scores(group, scores) for group in coupled}
    by_group = {name: units for name, units in found.items() if units is not None}
    scored = [group for group in coupled if group.name in by_group]
    if not scored:
        raise UserError(
            "no layer can be pruned: use another measure"
            if coupled
            else "no layer can be pruned: all are left alone, or write the logits"
        )
    if not all(by_group[group.name][group.alive].isfinite().all() for group in scored):
        raise UserError("some importance scores are not finite: did the training diverge?")
    alive = {group.name: group.alive for group in scored}
    may_go = {g.name: g.alive & ~_best(g, by_group[g.name], least or {}) for g in scored}
    if local:
        cuts, threshold = _lowest_of_each(scored, by_group, may_go, ratio), math.nan
    else:
        cuts, threshold = _lowest_of_all(scored, by_group, may_go, ratio)
    keep, rescued, spared = {}, [], 0
    for group in scored:
        units, name = by_group[group.name], group.name
        if cuts[name].any() and torch.equal(cuts[name], may_go[name]):
            rescued.append(group.members[0].layer)
        shifted = units - units.min()  # `round_up` takes scores from 0
        keep[name] = round_up(alive[name] & ~cuts[name], shifted, alive[name], round_to)
        spared += int((keep[name] & cuts[name]).sum())
    return Choice(ratio, threshold, alive, keep, rescued, spared)


def _unit_scores(group: Group, scores: Scores) -> torch.Tensor | None:
    """The mean of what the layers of a group score for each unit: (size,), infinite for those that
    are not alive; None where one that is has no score."""
    sums = torch.zeros(group.size, dtype=torch.double)
    layers = torch.zeros(group.size)  # with a score: not every layer has a channel of every unit
    for member in group.members:
        key = f"{member.layer}:in" if member.side == "in" else member.layer
        if key in scores:
            if len(scores[key]) <= member.channels.max():
                raise UserError(f"there are {len(scores[key])} scores for {key}: too few")
            own = scores[key].detach().double().cpu()[member.channels]
            count = torch.bincount(member.units, minlength=group.size)
            sums += torch.zeros_like(sums).index_add_(0, member.units, own) / count.clamp(min=1)
            layers += count > 0
    if not layers[group.alive].all():
        return None
    return (sums / layers).masked_fill(~group.alive, math.inf)


def _best(group: Group, units: torch.Tensor, least: Mapping[str, int]) -> torch.Tensor:
    """Where the best units of each layer of a group are: of a concatenation a layer writes a part
    of the units alone."""
    best = torch.zeros(group.size, dtype=torch.bool)
    for member in group.members:
        own = member.units[group.alive[member.units]].unique()
        count = 1 if member.side == "in" else least.get(member.layer, 1)
        best[own[units[own].argsort(descending=True, stable=True)[:count]]] = True
    return best


def _lowest_of_each(scored: list[Group], by_group: Scores, may_go: Masks, ratio: float) -> Masks:
    """Where the share ``ratio`` of each group with the lowest scores is."""
    cuts = {}
    for group in scored:
        order = by_group[group.name].argsort(stable=True)
        share = int(int(group.alive.sum()) * ratio + 1e-9)
        gone = order[may_go[group.name][order]][:share]
        cuts[group.name] = torch.zeros(group.size, dtype=torch.bool).index_fill_(0, gone, True)
    return cuts


def _lowest_of_all(
    scored: list[Group], by_group: Scores, may_go: Masks, ratio: float
) -> tuple[Masks, float]:
    """Where the lowest scores of all groups are that make up the share ``ratio`` of the filters,
    and the highest of those."""
    ranking = torch.cat([by_group[group.name] for group in scored])
    place = torch.cat([_places(by_group[group.name], group.alive) for group in scored])
    filters = torch.cat([group.filters for group in scored])
    order = place.argsort(stable=True)  # of equal scores those that stand lowest in their group
    order = order[ranking[order].argsort(stable=True)]
    order = order[torch.cat([may_go[group.name] for group in scored])[order]]
    gone = order[filters[order].cumsum(0) <= ratio * int(filters.sum()) + 1e-9]
    cut = torch.zeros(len(ranking), dtype=torch.bool).index_fill_(0, gone, True)
    parts = cut.split([group.size for group in scored])
    threshold = float(ranking[gone].max()) if len(gone) else -math.inf
    return {group.name: part for group, part in zip(scored, parts, strict=True)}, threshold


def _places(units: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """The place of each unit that is alive in the ranking of its group, from 0 to below 1."""
    return units.argsort(stable=True).argsort() / int(alive.sum())
