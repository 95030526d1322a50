"""Which groups can go, tried; slim any CNN: choose channels, slice, and prove."""

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from slimming.channels.groups import (
    Channels,
    Group,
    channels,
    copied,
    declared,
    lists_widths,
    with_selections,
)
from slimming.channels.inputs import Inputs
from slimming.channels.scaling import alive_channels
from slimming.channels.widths import BATCH_NORMS
from slimming.choosing import ranking
from slimming.choosing.importance import Scores
from slimming.choosing.threshold import Choice, Multiples, keep_one
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.progress import told
from slimming.slicing.proof import check_finite, compare
from slimming.slicing.slim import Kept, Masks, cfg_of, kept_channels, masked, sliced


def without_masked_channels(model: nn.Module, cfg: list | dict | None) -> nn.Module:
    """The slim network that is equivalent to a masked one of mask-impl; any other, and one that a
    ``cfg`` made slim, unchanged."""
    alive = alive_channels(model)
    if cfg or not lists_widths(model) or all(m.all() for m in alive.values()):
        return model
    return without_dead_channels(model)


SHARES = (3, 2, 4, 5, 6)  # one unit in so many goes, to try a group: not the same in all

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
    with told("trying which groups of channels can go"):
        sound = exact(model, found.groups, found.inputs)
    if len(sound) == len(found.groups):
        return found
    wrong = [g for g in found.groups if g not in sound]
    reason = "the code of the network holds the number of channels"
    return replace(found, groups=sound, pinned={**found.pinned, reason: [g.name for g in wrong]})


def exact(
    model: nn.Module, groups: list[Group], inputs: Inputs, keep: Masks | None = None
) -> list[Group]:
    """The groups that can be sliced `together`. ``keep``: the units that stay, by default other
    shares of neighbours: code may need the same number in two groups."""
    shares = itertools.cycle(SHARES)
    keep = keep or {g.name: _some(g, share) for g, share in zip(groups, shares, strict=False)}
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


def _some(group: Group, share: int) -> torch.Tensor:
    """All but one of ``share`` units, and at least one of each layer that writes the group. The
    first ones go, but the second stays: of parts whose sizes the code computes one loses more."""
    keep = group.alive.clone()
    keep[[0, *range(2, group.size // share + 1)]] = False
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


@dataclass(frozen=True)
class Slimmed:
    """A slim network, the choice for each group, the channels that each layer keeps (``kept``:
    layer -> side -> one bool per channel), and the largest relative difference of the outputs."""

    model: nn.Module
    choice: Choice
    kept: Kept
    difference: float

    @property
    def cfg(self) -> dict | list:
        """The ``cfg`` with which the dense constructor builds ``model``: see `cfg_of`."""
        return cfg_of(self.model)


def prune(
    model: nn.Module,
    scores: Scores,
    ratio: float,
    inputs: Inputs,
    *,
    local: bool = False,
    round_to: Multiples = 1,
    least: float = 0.0,
    ignore: Iterable[str] = (),
    only: Iterable[str] | None = None,
) -> Slimmed:
    """Remove the least important fraction ``ratio`` (0 to 1) of the filters, and prove the result.

    ``scores`` come from a measure of `importance`; they are ranked over the whole network or, with
    ``local``, within each group. Coupled layers keep a multiple of ``round_to`` channels, and at
    least the fraction ``least`` of their channels. What writes the outputs and the layers in
    ``ignore`` are not pruned, with ``only`` no others than these. ``inputs``: a tensor, a tuple of
    arguments or a dict of them. UserError if nothing can be pruned, or the model fails.

    >>> from slimming.choosing.importance import Evidence, l1
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, 10))
    >>> import torch
    >>> prune(net, l1(Evidence(net, [])), 0.5, torch.rand(2, 3, 32, 32)).model[0]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """

    def choose(coupled: list[Group]) -> Choice:
        return ranking.choose(coupled, scores, ratio, local=local, round_to=round_to, least=least)

    return chosen(model, channels(model, inputs, ignore, only), choose, inputs)


def chosen(
    model: nn.Module, found: Channels, choose: Callable[[list[Group]], Choice], inputs: Inputs
) -> Slimmed:
    """Slim ``model`` to the units of the groups ``found`` that ``choose`` keeps, and prove the
    result. Where the proof fails, it chooses again without the groups that cannot be sliced
    exactly: those that a trial finds, then those that this choice shows."""
    coupled = some(found)
    choice = choose(coupled)
    with contextlib.suppress(UserError):  # most networks need no trial: the proof is one
        return apply(model, coupled, choice, inputs)
    coupled = some(tried(model, found))
    choice = choose(coupled)
    with contextlib.suppress(UserError):
        return apply(model, coupled, choice, inputs)
    coupled = exact(model, coupled, inputs, choice.kept)
    return apply(model, coupled, choose(coupled), inputs)


def apply(model: nn.Module, coupled: list[Group], choice: Choice, inputs: Inputs) -> Slimmed:
    """Slim ``model`` to the units that ``choice`` keeps, and prove the result on ``inputs``.
    UserError if the slim network computes something else."""
    kept = kept_channels(coupled, choice.kept)
    slim = sliced(model, kept)
    reset_batch_counts(slim, kept)
    found = compare(copied(slim), masked(model, kept), kept, inputs)
    if not found.error:
        check_finite(found.outputs)
    if not found.is_exact:
        place = found.layer or "an operation outside its layers"
        shown = found.error or f"the outputs differ by {found.difference:.1e}"
        raise UserError(
            f"the network cannot be slimmed exactly: {place} mixes removed channels into kept "
            f"ones, or splits them: ignore the layers before it ({shown})"
        ) from found.error
    return Slimmed(slim, choice, kept, found.difference)


def reset_batch_counts(small: nn.Module, kept: Kept) -> None:
    """Reset the batch count of each sliced BN, as every version has done, except if its running
    average depends on that count (momentum None)."""
    for name, sides in kept.items():
        if "out" not in sides:
            continue
        layer = small.get_submodule(name)
        if not isinstance(layer, BATCH_NORMS) or layer.num_batches_tracked is None:
            continue  # it keeps no running average
        if layer.track_running_stats and layer.momentum is not None:
            layer.num_batches_tracked.zero_()


def kept_alive(model: nn.Module) -> Kept:
    """The channels of one of the paper's networks that are not γ = β = 0; at least one a layer."""
    form = with_selections(model)
    keep = keep_one(form, alive_channels(form))
    coupled = declared(form)
    return kept_channels(coupled, {group.name: keep[group.name] for group in coupled})


def without_dead_channels(model: nn.Module) -> nn.Module:
    """Slim one of the paper's networks by removing its channels with γ = β = 0; a layer keeps at
    least one channel."""
    assert lists_widths(model)
    return sliced(model, kept_alive(model))
