"""Slim any CNN: which channels stay, a network that holds those alone, and proof that it computes
what the dense one does without the others."""

import contextlib
import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from models.resize import LAYERS, is_depthwise, resize, widths
from slimming import pruning
from slimming.dependencies import Group, groups, width
from slimming.errors import UserError
from slimming.importance import Scores
from slimming.pruning import Choice, Masks


@dataclass(frozen=True)
class Slimmed:
    """A slim network, what was chosen group by group, what stays of each layer (``kept``: layer ->
    side -> one bool a channel), and the proof: the largest relative difference of the logits."""

    model: nn.Module
    choice: Choice
    kept: dict[str, Masks]
    difference: float


def prune(
    model: nn.Module,
    scores: Scores,
    ratio: float,
    images: torch.Tensor,
    *,
    local: bool = False,
    round_to: int = 1,
    ignore: Iterable[str] = (),
) -> Slimmed:
    """Remove the share ``ratio`` (0 to 1) of the filters, the least important first, and prove it.

    ``scores`` come from a measure of `slimming.importance`; they are compared over the whole
    network or, with ``local``, in each group alone. A layer keeps a multiple of ``round_to``
    channels, and always one. The classifier stays whole, as do the layers called in ``ignore``.
    ``images`` (N, 3, H, W) are what the network reads. UserError if it cannot be slimmed exactly.

    >>> from slimming.importance import Evidence, l1
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, 10))
    >>> prune(net, l1(Evidence(net, [])), 0.5, torch.rand(2, 3, 32, 32)).model[0]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    found = groups(model, images, ignore)
    choice = choose(found, scores, ratio, local=local, round_to=round_to)
    return apply(model, found, choice, images)


def apply(model: nn.Module, found: list[Group], choice: Choice, images: torch.Tensor) -> Slimmed:
    """Slim ``model`` to what ``choice`` keeps of its groups, and prove the result."""
    kept = _kept_channels(model, found, choice.keep)
    slim = _sliced(model, kept)
    reference = masked(model, kept)
    try:
        difference, failure = pruning.prove_equal(slim, reference, images), None
    except (UserError, RuntimeError) as error:
        difference, failure = math.nan, error
    where = _first_difference(slim, reference, kept, images)  # logits alone may hang on nothing
    if where or failure:
        raise UserError(
            f"the network cannot be slimmed exactly: {where or 'an operation outside its layers'} "
            "mixes channels that were removed into those that stay, or cuts them apart. Leave the "
            f"layers before it alone ({failure or 'the logits do not show it'})"
        ) from failure
    return Slimmed(slim, choice, kept, difference)


def choose(
    found: list[Group],
    scores: Scores,
    ratio: float,
    *,
    local: bool = False,
    round_to: int = 1,
) -> Choice:
    """The units of each group that stay when the share ``ratio`` of all filters goes.

    The score of a unit is the mean over the layers of its group that have one. Groups without a
    score stay whole. UserError if there is none with a score, or a score is not finite.
    """
    if not 0 <= ratio < 1 or round_to < 1:
        raise UserError(
            f"the ratio must be from 0 to below 1, not {ratio}, and round_to at least 1"
        )
    by_group = {group.name: _unit_scores(group, scores) for group in found}
    scored = [group for group in found if by_group[group.name] is not None]
    if not scored:
        raise UserError(
            "no layer can be pruned: use another measure"
            if found
            else "no layer can be pruned: all are left alone, or write the logits"
        )
    if not all(by_group[group.name].isfinite().all() for group in scored):
        raise UserError("some importance scores are not finite: did the training diverge?")
    alive = {group.name: torch.ones(group.size, dtype=torch.bool) for group in scored}
    if local:
        cuts = {g.name: _lowest(g, by_group[g.name], int(g.size * ratio + 1e-9)) for g in scored}
        threshold = math.nan
    else:
        cuts, threshold = _lowest_of_all(scored, by_group, ratio)
    keep, rescued = {}, []
    for group in scored:
        units, name = by_group[group.name], group.name
        if group.size > 1 and units.max() <= threshold:
            rescued.append(name)
        shifted = units - units.min()  # `round_up` takes scores from 0
        keep[name] = pruning.round_up(~cuts[name], shifted, alive[name], round_to)
    return Choice(ratio, threshold, alive, keep, rescued)


def masked(model: nn.Module, kept: dict[str, Masks]) -> nn.Module:
    """A copy on the CPU of the dense network in which nothing reads the channels that are not kept:
    the weights for them are zero in every layer that reads them."""
    copied = copy.deepcopy(model).cpu().eval()
    for name, sides in kept.items():
        layer = copied.get_submodule(name)
        if "in" in sides:
            with torch.no_grad():
                layer.weight[:, ~_of_one_group(layer, sides["in"])] = 0
    return copied


def slice_tensors(
    model: nn.Module, tensors: dict[str, torch.Tensor], kept: dict[str, Masks]
) -> dict[str, torch.Tensor]:
    """What stays of ``tensors``, which are named and shaped like the parameters and buffers of the
    dense ``model``: weights, momentum, initial values, averages of gradients."""
    sliced = dict(tensors)
    for name, sides in kept.items():
        layer = model.get_submodule(name)
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensor = sliced.get(f"{name}.{part}")
            if tensor is None:
                continue
            if "out" in sides:
                tensor = tensor[sides["out"].to(tensor.device)]
            if "in" in sides and part == "weight":
                tensor = tensor[:, _of_one_group(layer, sides["in"]).to(tensor.device)]
            sliced[f"{name}.{part}"] = tensor
    return sliced


def cfg_of(model: nn.Module) -> dict | list:
    """What the dense constructor needs to build a network of these widths: the widths of each
    layer by its name; of this suite's VGG the list that it takes."""
    found = widths(model)
    if not isinstance(getattr(model, "cfg", None), list):
        return found
    convs = iter(out for (_, out) in (w for w in found.values() if len(w) == 2))
    return ["M" if width == "M" else next(convs) for width in model.cfg]


def _unit_scores(group: Group, scores: Scores) -> torch.Tensor | None:
    """The mean of what the layers of a group score for each unit: (size,); None where a unit has
    no score."""
    total = torch.zeros(group.size, dtype=torch.double)
    layers = torch.zeros(group.size)  # with a score: not every layer has a channel of every unit
    for member in group.members:
        key = member.layer if member.side == "out" else f"{member.layer}:in"
        if key in scores:
            own = scores[key].detach().double().cpu()[member.channels]
            count = torch.bincount(member.units, minlength=group.size)
            total += torch.zeros_like(total).index_add_(0, member.units, own) / count.clamp(min=1)
            layers += count > 0
    return total / layers if layers.all() else None


def _lowest(group: Group, units: torch.Tensor, count: int) -> torch.Tensor:
    """Where the ``count`` lowest scores are. The best unit of each layer is never among them: of a
    concatenation a layer writes a part of the units alone."""
    stays = torch.zeros(len(units), dtype=torch.bool)
    for member in group.members:
        stays[member.units[units[member.units].argmax()]] = True
    order = units.argsort(stable=True)
    cut = torch.zeros(len(units), dtype=torch.bool)
    cut[order[~stays[order]][:count]] = True
    return cut


def _lowest_of_all(
    scored: list[Group], by_group: dict[str, torch.Tensor], ratio: float
) -> tuple[Masks, float]:
    """Where the lowest scores of all groups are that make up the share ``ratio`` of the filters,
    and the highest of those."""
    ranking = torch.cat([by_group[group.name] for group in scored])
    cost = torch.cat([torch.full((group.size,), group.filters) for group in scored])
    may_go = torch.cat([_lowest(g, by_group[g.name], g.size) for g in scored])
    order = ranking.argsort(stable=True)
    order = order[may_go[order]]
    gone = order[cost[order].cumsum(0) <= ratio * cost.sum() + 1e-9]
    cut = torch.zeros(len(ranking), dtype=torch.bool)
    cut[gone] = True
    parts = cut.split([group.size for group in scored])
    threshold = float(ranking[gone].max()) if len(gone) else -math.inf
    return {group.name: part for group, part in zip(scored, parts, strict=True)}, threshold


def _kept_channels(model: nn.Module, found: list[Group], keep: Masks) -> dict[str, Masks]:
    """Layer -> side ('out', 'in') -> which of its channels stay."""
    kept = {}
    for group in found:
        if group.name not in keep or keep[group.name].all():
            continue
        for member in group.members:
            layer = model.get_submodule(member.layer)
            sides = kept.setdefault(member.layer, {})
            mask = sides.setdefault(
                member.side, torch.ones(width(layer, member.side), dtype=torch.bool)
            )
            mask[member.channels] &= keep[group.name][member.units]
    for name, sides in kept.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d) and not is_depthwise(layer):
            rows = [mask.view(layer.groups, -1) for mask in sides.values()]
            if any((row != row[0]).any() for row in rows):
                raise UserError(
                    f"the groups of {name} would lose different channels, because several layers "
                    "write them: leave the layers before it alone"
                )
    return kept


def _of_one_group(layer: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """The mask of a layer's input channels as it stands in the second dimension of its weight."""
    return mask.view(getattr(layer, "groups", 1), -1)[0]


def _sliced(model: nn.Module, kept: dict[str, Masks]) -> nn.Module:
    """A copy of ``model`` on the CPU that holds the kept channels alone."""
    small = copy.deepcopy(model).cpu().eval()
    state = small.state_dict()  # updated in place: it carries the versions of the layers
    state.update(slice_tensors(model, state, kept))
    cfg = {}
    for name, sides in kept.items():
        layer = model.get_submodule(name)
        shape = list(widths(layer)[""])
        if "in" in sides:
            shape[0] = int(sides["in"].sum())
        if "out" in sides:
            shape[-1] = int(sides["out"].sum())
            if isinstance(layer, nn.Conv2d) and is_depthwise(layer):
                shape[0] = shape[-1]
        cfg[name] = shape
    try:
        resize(small, cfg)
        small.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the network cannot be slimmed exactly: {error}") from error
    small.cfg = cfg_of(small)
    return small


@torch.no_grad()
def _first_difference(
    small: nn.Module, reference: nn.Module, kept: dict[str, Masks], images: torch.Tensor
) -> str | None:
    """The name of the first layer, in the order of the forward pass, whose kept channels differ.

    In fp64, relative to the largest output of the layer.
    """
    seen = [_outputs(model, images[:2]) for model in (small, reference)]
    for (name, ours), (_, theirs) in zip(*seen, strict=False):
        if "out" in kept.get(name, {}):
            dim = -1 if isinstance(small.get_submodule(name), nn.Linear) else 1
            theirs = theirs.index_select(dim, kept[name]["out"].nonzero().flatten())
        if ours.shape != theirs.shape:
            continue  # a layer without channels of its own, or behind one that differs
        if not (ours - theirs).abs().max() <= pruning.TOLERANCE * theirs.abs().max():
            return name
    return None


def _outputs(model: nn.Module, images: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """What each layer of a copy of ``model`` puts out, by its name, as far as the model comes."""
    copied, outputs = copy.deepcopy(model).double(), []
    for name, layer in copied.named_modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_hook(
                lambda _, __, out, name=name: outputs.append((name, out.clone()))
            )
    with contextlib.suppress(RuntimeError):
        copied(images.double().cpu())
    return outputs
