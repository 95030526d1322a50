"""Which channels can go, tried: slim and masked networks must be equal without some of them."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from slimming.channels.groups import Channels, Group, channels, lists_widths
from slimming.channels.inputs import Inputs
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.pruning.slicing.proof import compare
from slimming.pruning.slicing.slim import Masks, kept_channels, masked, sliced

SHARE = 3  # one unit in three goes, to try a group

Item = TypeVar("Item")


def prunable(
    model: nn.Module,
    inputs: Inputs,
    ignore: Iterable[str] = (),
    only: Iterable[str] | None = None,
) -> Channels:
    """The coupled channels of ``model`` (see `channels`), without the groups that cannot be sliced
    exactly: because a number in the code of a module does not follow, or an operation does
    something else with fewer channels than its rule says."""
    return tried(model, channels(model, inputs, ignore, only))


def tried(model: nn.Module, found: Channels) -> Channels:
    """What was ``found``, without the groups that a trial shows cannot be sliced exactly."""
    if lists_widths(model):  # the paper's: nothing in their code holds a width
        return found
    sound = exact(model, found.groups, found.inputs)
    if len(sound) == len(found.groups):
        return found
    wrong = [g for g in found.groups if g not in sound]
    reason = "the code of the network holds the number of channels"
    return replace(found, groups=sound, pinned={**found.pinned, reason: [g.name for g in wrong]})


def exact(
    model: nn.Module, groups: list[Group], inputs: Inputs, keep: Masks | None = None
) -> list[Group]:
    """The groups that can be sliced `together`. ``keep``: the units that stay, by default two of
    three in each group."""
    keep = keep or {group.name: _some(group) for group in groups}
    return together(groups, lambda several: holds(model, several, keep, inputs))


def together(items: list[Item], hold: Callable[[list[Item]], bool]) -> list[Item]:
    """Those of ``items`` that ``hold`` together, in their order: of those that do not, halves are
    tried, and halves of these."""

    def grown(accepted: list[Item], more: list[Item]) -> list[Item]:
        if not more or hold([*accepted, *more]):
            return [*accepted, *more]
        if len(more) == 1:
            return accepted
        half = len(more) // 2
        return grown(grown(accepted, more[:half]), more[half:])

    return grown([], items)


def holds(model: nn.Module, groups: list[Group], keep: Masks, inputs: Inputs) -> bool:
    """Whether the network that keeps these units of the groups equals the masked one."""
    kept = kept_channels(groups, {group.name: keep[group.name] for group in groups})
    try:
        return compare(sliced(model, kept), masked(model, kept), kept, inputs).is_exact
    except Exception as error:  # the user's forward may raise anything at other widths
        raise_if_of_the_machine(error)
        return False


def _some(group: Group) -> torch.Tensor:
    """Two of three units, and at least one of each layer that writes the group. The first ones go,
    but the second stays: of parts whose sizes the code computes one loses more than its share."""
    keep = group.alive.clone()
    keep[[0, *range(2, group.size // SHARE + 1)]] = False
    for member in group.members:
        if not keep[member.units].any():
            keep[member.units[0]] = True
    return keep


def groups(
    model: nn.Module,
    inputs: Inputs,
    ignore: Iterable[str] = (),
    only: Iterable[str] | None = None,
) -> list[Group]:
    """The channels of ``model`` that can be removed, as `Group`s in the order of its modules.
    UserError if there are none."""
    return some(prunable(model, inputs, ignore, only))


def some(found: Channels) -> list[Group]:
    """The groups that were found. UserError, with what pins the channels, if there are none."""
    if not found.groups:
        raise UserError(f"no layer of the network can be pruned: {_reasons(found)}")
    return found.groups


def _reasons(found: Channels) -> str:
    """Why channels stay, the reason of most layers first."""
    most = sorted(found.pinned.items(), key=lambda item: -len(item[1]))
    told = [
        f"{reason} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for reason, names in most
    ]
    return "; ".join(told[:3]) or "it has no layers with channels, or all are ignored"


def declared(model: nn.Module, ignore: Iterable[str] = ()) -> list[Group]:
    """The groups of one of the paper's networks, which all read 3x32x32 images."""
    assert lists_widths(model), "not one of the paper's networks: pass inputs to `groups`"
    return channels(model, torch.zeros(1, 3, 32, 32), ignore).groups
