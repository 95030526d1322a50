"""Slim any CNN: which channels stay, a network that holds those alone, and proof that it computes
what the dense one does without the others."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from models.resize import is_depthwise, resize, widths
from slimming.errors import UserError
from slimming.pruning import ranking
from slimming.pruning.choice import Choice
from slimming.pruning.groups import Group, groups, width
from slimming.pruning.importance import Scores
from slimming.pruning.proof import _first_difference, prove_equal
from slimming.pruning.scaling import Masks


@dataclass(frozen=True)
class Slimmed:
    """A slim network, what was chosen group by group, what stays of each layer (``kept``: layer ->
    side -> one bool a channel), and the proof: the largest relative difference of the logits."""

    model: nn.Module
    choice: Choice
    kept: dict[str, Masks]
    difference: float

    @property
    def cfg(self) -> dict | list:
        """What the dense constructor needs to build ``model``: see `cfg_of`."""
        return cfg_of(self.model)


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

    ``scores`` come from a measure of `importance`; they are compared over the whole
    network or, with ``local``, in each group alone. Layers that only lose channels together keep a
    multiple of ``round_to`` of them, and always one. The classifier stays whole, as do the layers
    called in ``ignore``. ``images`` (N, 3, H, W) are what the network reads. UserError if it cannot
    be slimmed exactly.

    >>> from slimming.importance import Evidence, l1
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, 10))
    >>> prune(net, l1(Evidence(net, [])), 0.5, torch.rand(2, 3, 32, 32)).model[0]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    found = groups(model, images, ignore)
    choice = ranking.choose(found, scores, ratio, local=local, round_to=round_to)
    return apply(model, found, choice, images)


def apply(model: nn.Module, found: list[Group], choice: Choice, images: torch.Tensor) -> Slimmed:
    """Slim ``model`` to what ``choice`` keeps of its groups, and prove the result."""
    kept = _kept_channels(model, found, choice.keep)
    slim = _sliced(model, kept)
    reference = masked(model, kept)
    try:
        difference, failure = prove_equal(slim, reference, images), None
    except Exception as error:  # whatever the user's forward raises at widths it does not expect
        difference, failure = math.nan, error
    where = _first_difference(slim, reference, kept, images)  # logits alone may hang on nothing
    if where or failure:
        raise UserError(
            f"the network cannot be slimmed exactly: {where or 'an operation outside its layers'} "
            "mixes channels that were removed into those that stay, or cuts them apart. Leave the "
            f"layers before it alone ({failure or 'the logits do not show it'})"
        ) from failure
    return Slimmed(slim, choice, kept, difference)


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
    if not hasattr(model, "wiring"):
        return found
    convs = iter(out for (_, out) in (w for w in found.values() if len(w) == 2))
    return ["M" if width == "M" else next(convs) for width in model.cfg]


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
    if hasattr(model, "wiring"):
        small.cfg = cfg_of(small)
    return small
