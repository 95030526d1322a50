"""Slim any CNN: choose channels, build the network that has only these, and prove that it computes
the same as the dense network without the others."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from slimming.errors import UserError
from slimming.pruning import ranking
from slimming.pruning.choice import Choice, Multiples
from slimming.pruning.coupling import Group, is_wired
from slimming.pruning.groups import declared, groups
from slimming.pruning.importance import Scores
from slimming.pruning.proof import first_difference, prove_equal
from slimming.pruning.scaling import Masks, alive_channels, present_channels, selections
from slimming.pruning.threshold import keep_one
from slimming.pruning.widths import (
    BATCH_NORMS,
    Layer,
    fit_to,
    is_depthwise,
    layer_of,
    layer_widths,
    set_widths,
    width,
    widths,
)
from slimming.runtime.failures import raise_if_of_the_machine

Kept = dict[str, Masks]  # layer -> side ('out', 'in', 'mask') -> one bool for each channel


@dataclass(frozen=True)
class Slimmed:
    """A slim network, the choice for each group, the channels that each layer keeps (``kept``:
    layer -> side -> one bool per channel), and the largest relative difference of the logits."""

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
    images: torch.Tensor,
    *,
    local: bool = False,
    round_to: Multiples = 1,
    least: float = 0.0,
    ignore: Iterable[str] = (),
) -> Slimmed:
    """Remove the least important fraction ``ratio`` (0 to 1) of the filters, and prove the result.

    ``scores`` come from a measure of `importance`; they are ranked over the whole network or, with
    ``local``, within each group. Coupled layers keep a multiple of ``round_to`` channels, and at
    least the fraction ``least`` of their channels. The classifier and the layers in ``ignore`` are
    not pruned. ``images`` (N, 3, H, W) are inputs of the network. UserError if the network cannot
    be slimmed exactly.

    >>> from slimming.pruning.importance import Evidence, l1
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, 10))
    >>> prune(net, l1(Evidence(net, [])), 0.5, torch.rand(2, 3, 32, 32)).model[0]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    coupled = groups(model, images, ignore)
    choice = ranking.choose(coupled, scores, ratio, local=local, round_to=round_to, least=least)
    return apply(model, coupled, choice, images)


def apply(model: nn.Module, coupled: list[Group], choice: Choice, images: torch.Tensor) -> Slimmed:
    """Slim ``model`` to the units that ``choice`` keeps, and prove the result on ``images``
    (N, 3, H, W). UserError if the slim network computes something else."""
    kept = kept_channels(model, coupled, choice.keep)
    slim, reference = sliced(model, kept), masked(model, kept)
    _reset_batch_counts(slim, kept)
    try:
        difference, failure = prove_equal(slim, reference, images), None
    except Exception as error:  # the user's forward may raise anything at unexpected widths
        raise_if_of_the_machine(error)
        difference, failure = math.nan, error
    where = first_difference(slim, reference, kept, images)  # the logits may not depend on it
    if where or failure:
        raise UserError(
            f"the network cannot be slimmed exactly: {where or 'an operation outside its layers'} "
            "mixes removed channels into kept ones, or splits them: ignore the layers before it "
            f"({failure or 'the logits do not show it'})"
        ) from failure
    return Slimmed(slim, choice, kept, difference)


def kept_channels(model: nn.Module, coupled: list[Group], keep: Masks) -> Kept:
    """The channels that each layer keeps when each group keeps the units ``keep[name]``; layers and
    groups without an entry keep all."""
    if unknown := keep.keys() - {group.name for group in coupled}:
        raise ValueError(f"the network has no groups called {', '.join(sorted(unknown))}")
    kept: Kept = {}
    for group in coupled:
        if group.name not in keep or keep[group.name].all():
            continue
        for member in group.members:
            layer = layer_of(model, member.layer)
            sides = kept.setdefault(member.layer, {})
            whole = torch.ones(width(layer, member.side), dtype=torch.bool)
            mask = sides.setdefault(member.side, whole)
            mask[member.channels] &= keep[group.name][member.units]
    for name, sides in kept.items():
        layer = layer_of(model, name)
        if isinstance(layer, nn.Conv2d) and not is_depthwise(layer):
            rows = [mask.view(layer.groups, -1) for mask in sides.values()]
            if any((row != row[0]).any() for row in rows):
                raise UserError(
                    f"the groups of {name} would lose different channels, because several layers "
                    "write them: ignore the layers before it"
                )
    return kept


def sliced(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of ``model`` on the CPU, in eval mode, that has only the kept channels."""
    small = _to_slice(model)
    state = small.state_dict()  # updated in place: it has the version metadata of the layers
    state.update(slice_tensors(small, state, kept))
    try:
        for name, sides in kept.items():
            if sides.keys() != {"mask"}:
                layer = layer_of(small, name)
                set_widths(layer, _left_widths(layer, sides))
        small.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the network cannot be slimmed exactly: {error}") from error
    return _with_cfg(small)


def slice_tensors(
    model: nn.Module, tensors: dict[str, torch.Tensor], kept: Kept
) -> dict[str, torch.Tensor]:
    """Slice ``tensors``, which have the names and shapes of the parameters and buffers of the dense
    ``model``: weights, momentum, initial values, averages of gradients."""
    left, masks = dict(tensors), selections(model)
    for name, sides in kept.items():
        layer = model.get_submodule(name)
        if "mask" in sides:
            indexes = f"{masks[name]}.indexes"
            left |= {indexes: sides["mask"].to(left[indexes])} if indexes in left else {}
            for part in (f"{name}.weight", f"{name}.bias"):  # γ and β that nothing reads any more
                if part in left:
                    left[part] = left[part] * sides["mask"].to(left[part])
            continue
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensor = left.get(f"{name}.{part}")
            if tensor is None:
                continue
            if "out" in sides:
                tensor = tensor[sides["out"].to(tensor.device)]
            if "in" in sides and part == "weight":
                tensor = tensor[:, _of_one_group(layer, sides["in"]).to(tensor.device)]
            left[f"{name}.{part}"] = tensor
    return left


def masked(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the dense network on the CPU in which no layer reads the removed channels: its
    weights for them are zero."""
    copied = copy.deepcopy(model).cpu().eval()
    for name, sides in kept.items():
        layer = layer_of(copied, name)
        if "in" in sides:
            with torch.no_grad():
                layer.weight[:, ~_of_one_group(layer, sides["in"])] = 0
    return copied


def living(model: nn.Module) -> Kept:
    """The channels of a network with ``wiring()`` that are not γ = β = 0; at least one a layer."""
    keep = keep_one(model, alive_channels(model))
    return kept_channels(model, declared(model), keep)


def without_dead_channels(model: nn.Module) -> nn.Module:
    """Slim a network with ``wiring()`` by removing its channels with γ = β = 0; a layer keeps at
    least one channel. On the CPU, in eval mode."""
    return sliced(model, living(model))


def scatter(slim: nn.Module, masked: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the ``masked`` network, on the CPU in eval mode, with the weights of the equal
    ``slim`` network written to the channels that are kept: the inverse of `sliced`."""
    state = {name: value.clone() for name, value in masked.state_dict().items()}
    for name, value in slim.state_dict().items():
        layer, _, part = name.rpartition(".")
        if name not in state or not value.dim():
            continue
        sides = kept.get(layer, {})
        place = [torch.arange(size) for size in state[name].shape[:2]]
        if "out" in sides:
            place[0] = sides["out"].nonzero().flatten()
        if "in" in sides and part == "weight":
            place[1] = _of_one_group(layer_of(masked, layer), sides["in"]).nonzero().flatten()
        state[name][torch.meshgrid(*place, indexing="ij")] = value.to(state[name])
    filled = copy.deepcopy(masked).cpu().eval()
    filled.load_state_dict(state)
    return filled


def load_slim_state(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """Load the state dict of a slim network into the dense ``model`` that it comes from: its layers
    get the widths of the tensors, in place. UserError if ``state`` is of another network.

    >>> slim = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    >>> dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> load_slim_state(dense, slim.state_dict())[0]
    Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1))
    """
    try:
        fit_to(model, state).load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"these are not weights of a slim version of the network: {reason}") from (
            error
        )
    return _with_cfg(model)


def cfg_of(model: nn.Module, keep: Masks | None = None) -> dict | list:
    """The ``cfg`` with which the dense constructor builds a network of these widths: a dict of the
    widths of each layer, or for a network with ``wiring()`` the list of the kept channels of each
    BN (of ``keep``; by default those that reach the next layer) with VGG's 'M'."""
    if not is_wired(model):
        return widths(model)
    stay = present_channels(model) | (keep or {})
    counts = iter([int(mask.sum()) for mask in stay.values()])
    return [entry if entry == "M" else next(counts) for entry in model.cfg]


def _to_slice(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, whose state dict has all masks: networks of the mask
    implementation become their ``slim_form``, which has channel selection."""
    build = getattr(model, "slim_form", None)
    if build is None:
        return copy.deepcopy(model).cpu().eval()
    options = getattr(model, "options", {})
    form = build(depth=model.depth, cfg=model.cfg, num_classes=model.num_classes, **options)
    form.load_state_dict({**form.state_dict(), **model.state_dict()})
    return form.eval()


def _left_widths(layer: Layer, sides: Masks) -> list[int]:
    """The widths of a layer that keeps these channels."""
    shape = layer_widths(layer)
    if "in" in sides:
        shape[0] = int(sides["in"].sum())
    if "out" in sides:
        shape[-1] = int(sides["out"].sum())
        if isinstance(layer, nn.Conv2d) and is_depthwise(layer):
            shape[0] = shape[-1]
    return shape


def _reset_batch_counts(small: nn.Module, kept: Kept) -> None:
    """Reset the batch count of each sliced BN, as every version has done, except if its running
    average depends on that count (momentum None)."""
    for name, sides in kept.items():
        layer = small.get_submodule(name)
        if not isinstance(layer, BATCH_NORMS) or layer.num_batches_tracked is None:
            continue  # it keeps no running average
        if "out" in sides and layer.track_running_stats and layer.momentum is not None:
            layer.num_batches_tracked.zero_()


def _of_one_group(layer: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """The mask of a layer's input channels along the second dimension of its weight."""
    return mask.view(getattr(layer, "groups", 1), -1)[0]


def _with_cfg(small: nn.Module) -> nn.Module:
    """The network itself, with its ``cfg`` updated if it has a ``wiring()``."""
    if is_wired(small):
        small.cfg = cfg_of(small)
    return small
