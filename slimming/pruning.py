"""Scaling factors -> threshold -> masks -> sliced layers -> proof of equality.

Network Slimming (Liu et al., ICCV 2017), section 3: one threshold on |γ| over the whole network.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from slimming.errors import UserError
from slimming.sparsity import batch_norms

Masks = dict[str, torch.Tensor]  # name of a BN -> one bool for each of its channels
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Choice:
    """Which channels stay: ``keep``, a part of ``alive``, after ``threshold`` on |γ|.

    ``rescued`` names the layers that would have lost every channel and keep their largest |γ|,
    ``spared`` counts the channels that stay for the sake of a multiple alone.
    """

    percent: float
    threshold: float
    alive: Masks
    keep: Masks
    rescued: list[str]
    spared: int = 0

    @property
    def channels(self) -> tuple[int, int]:
        """How many channels are alive before and after."""
        return sum(int(a.sum()) for a in self.alive.values()), sum(
            int(k.sum()) for k in self.keep.values()
        )


def selections(model: nn.Module) -> dict[str, str]:
    """For each BN that stays whole, because no layer writes it, the name of the selection after it.

    The network declares with ``wiring()`` which layer reads and writes which BN; one that declares
    nothing has no selections.
    """
    if not hasattr(model, "wiring"):
        return {}
    written = {wire.writes for wire in model.wiring()}
    return {
        name: f"{name.rpartition('.')[0]}.select".lstrip(".")
        for name in batch_norms(model)
        if name not in written
    }


def present_channels(model: nn.Module) -> Masks:
    """The channels of each BN that go on to the next layer: all, or those its selection keeps."""
    masks = {
        name: torch.ones(bn.num_features, dtype=torch.bool)
        for name, bn in batch_norms(model).items()
    }
    for name, selection in selections(model).items():
        select = model.get_submodule(selection)
        if hasattr(select, "indexes"):  # the mask implementation has no selection
            masks[name] = select.indexes.detach().cpu() != 0
    return masks


def alive_channels(model: nn.Module) -> Masks:
    """The present channels that compute something: not those with γ = β = 0."""
    present = present_channels(model)
    return {
        name: present[name] & ((bn.weight != 0) | (bn.bias != 0)).detach().cpu()
        for name, bn in batch_norms(model).items()
    }


def scaling_factors(model: nn.Module) -> Masks:
    """|γ| of every channel of each BN: name -> (C,) fp32 on the CPU."""
    return {name: bn.weight.detach().float().cpu().abs() for name, bn in batch_norms(model).items()}


def choose_channels(
    model: nn.Module, percent: float, at_least_one: bool = True, round_to: int = 1
) -> Choice:
    """The channels that survive when ``percent`` (0 <= percent < 1) of those alive are pruned.

    The threshold is the value at position int(total · percent) of the sorted |γ| of the whole
    network; a channel stays if its |γ| is strictly greater. With ``at_least_one`` a layer that
    would lose every channel keeps its largest |γ|. With ``round_to`` each layer keeps as many
    more, the largest first, as make a multiple of it (or all that are alive). UserError if a
    scaling factor is not finite.
    """
    factors, alive = scaling_factors(model), alive_channels(model)
    ranked = torch.cat([factors[name][alive[name]] for name in factors]).sort().values
    if not len(ranked) or not ranked.isfinite().all():
        raise UserError(
            "the network has scaling factors that are not finite, or none at all: "
            "prune a checkpoint of a run that did not diverge"
        )
    threshold = ranked[int(len(ranked) * percent)]
    keep = {name: alive[name] & (factors[name] > threshold) for name in factors}
    rescued = [name for name, mask in keep.items() if at_least_one and not mask.any()]
    keep = keep_one(model, keep) if at_least_one else keep
    rounded = {n: round_up(mask, factors[n], alive[n], round_to) for n, mask in keep.items()}
    spared = sum(int(rounded[n].sum() - mask.sum()) for n, mask in keep.items())
    return Choice(percent, float(threshold), alive, rounded, rescued, spared)


def round_up(
    keep: torch.Tensor, factors: torch.Tensor, alive: torch.Tensor, multiple: int
) -> torch.Tensor:
    """``keep`` and the largest other ``factors`` that are alive, up to a multiple of channels."""
    missing = -int(keep.sum()) % multiple
    others = factors.masked_fill(keep | ~alive, -1)
    more = others.argsort(descending=True, stable=True)[:missing]
    rounded = keep.clone()
    rounded[more[others[more] >= 0]] = True
    return rounded


def keep_one(model: nn.Module, keep: Masks) -> Masks:
    """``keep``, and in each layer that keeps no channel the one with the largest |γ|."""
    factors, present = scaling_factors(model), present_channels(model)
    keep = {name: mask.clone() for name, mask in keep.items()}
    for name, mask in keep.items():
        if not mask.any():
            mask[factors[name].masked_fill(~present[name], -1).argmax()] = True
    return keep


def cfg_of(model: nn.Module, keep: Masks) -> list:
    """The ``cfg`` of what ``keep`` leaves: the kept channels of each BN, 'M' for VGG's pooling."""
    widths = iter([int(mask.sum()) for mask in keep.values()])
    return [width if width == "M" else next(widths) for width in model.cfg]


def slim(model: nn.Module, keep: Masks) -> nn.Module:
    """The network in which only the channels of ``keep`` are left, on the CPU.

    It computes what ``masked(model, keep)`` computes.
    """
    present = present_channels(model)
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    for layer, reads, writes in model.wiring():
        weight = state[f"{layer}.weight"]
        if writes:
            weight = weight[keep[writes]]
        if reads:
            weight = weight[:, keep[reads][present[reads]]]
        state[f"{layer}.weight"] = weight
    whole = selections(model)
    for name, mask in keep.items():
        if name in whole:
            state[f"{whole[name]}.indexes"] = mask.float()
            continue
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{tensor}"] = state[f"{name}.{tensor}"][mask]
    build = getattr(model, "slim_form", type(model))  # mask-impl: the network with selection
    options = getattr(model, "options", {})
    cfg = cfg_of(model, keep)
    small = build(depth=model.depth, cfg=cfg, num_classes=model.num_classes, **options)
    small.load_state_dict(state)
    return small.eval()


@torch.no_grad()
def zero_channels(model: nn.Module, keep: Masks) -> None:
    """Set γ and β of every channel that is not in ``keep`` to zero, in place."""
    for name, bn in batch_norms(model).items():
        mask = keep[name].to(bn.weight.device)
        bn.weight.mul_(mask)
        bn.bias.mul_(mask)


def masked(model: nn.Module, keep: Masks) -> nn.Module:
    """A copy of the network, on the CPU, in which the channels that are not kept are zeroed."""
    copied = copy.deepcopy(model).cpu().eval()
    zero_channels(copied, keep)
    return copied


def only_logits(outputs: object) -> torch.Tensor:
    """What a network puts out, if that is one tensor; else UserError."""
    if not isinstance(outputs, torch.Tensor):
        raise UserError(
            f"the network returns a {type(outputs).__name__}, not a tensor of logits: wrap it in a "
            "module that returns the logits alone"
        )
    return outputs


@torch.no_grad()
def prove_equal(small: nn.Module, reference: nn.Module, images: torch.Tensor) -> float:
    """The largest difference of two networks' logits on ``images`` (N, 3, H, W), relative to the
    largest logit, in fp32 on the CPU. UserError past 1e-4: the slim network would be wrong.
    """
    images = images.float().cpu()
    copies = [copy.deepcopy(model).cpu().float().eval() for model in (small, reference)]
    ours, theirs = (only_logits(model(images)) for model in copies)
    scale = theirs.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float((ours - theirs).abs().max() / scale)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the slim network differs from the masked one by {difference:.1e} of the "
            f"largest logit (allowed: {TOLERANCE:.0e}): nothing is written. Please "
            "report this with the checkpoint"
        )
    return difference
