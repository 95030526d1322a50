"""Slim any CNN: choose channels, build the network that has only these, and prove that it computes
the same as the dense network without the others."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from slimming.channels.groups import (
    Channels,
    Group,
    channels,
    copied,
    lists_widths,
    with_selections,
)
from slimming.channels.inputs import Inputs
from slimming.channels.scaling import alive_channels
from slimming.channels.widths import BATCH_NORMS
from slimming.errors import UserError
from slimming.pruning import ranking
from slimming.pruning.choice import Choice, Multiples
from slimming.pruning.importance import Scores
from slimming.pruning.slicing.proof import compare
from slimming.pruning.slicing.slim import Kept, cfg_of, kept_channels, masked, sliced
from slimming.pruning.slicing.trial import declared, exact, some, tried
from slimming.pruning.threshold import keep_one


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

    >>> from slimming.pruning.importance import Evidence, l1
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
    coupled = exact(model, coupled, inputs, choice.keep)
    return apply(model, coupled, choose(coupled), inputs)


def apply(model: nn.Module, coupled: list[Group], choice: Choice, inputs: Inputs) -> Slimmed:
    """Slim ``model`` to the units that ``choice`` keeps, and prove the result on ``inputs``.
    UserError if the slim network computes something else."""
    kept = kept_channels(coupled, choice.keep)
    slim = sliced(model, kept)
    reset_batch_counts(slim, kept)
    found = compare(copied(slim), masked(model, kept), kept, inputs)
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


def living(model: nn.Module) -> Kept:
    """The channels of one of the paper's networks that are not γ = β = 0; at least one a layer."""
    form = with_selections(model)
    keep = keep_one(form, alive_channels(form))
    coupled = declared(form)
    return kept_channels(coupled, {group.name: keep[group.name] for group in coupled})


def without_dead_channels(model: nn.Module) -> nn.Module:
    """Slim one of the paper's networks by removing its channels with γ = β = 0; a layer keeps at
    least one channel."""
    assert lists_widths(model)
    return sliced(model, living(model))
