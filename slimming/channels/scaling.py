"""The scaling factors γ of a network, and which channels are alive."""

import torch
from torch import nn

from slimming.channels.kinds import is_selection
from slimming.channels.widths import BATCH_NORMS, BatchNorm

Masks = dict[str, torch.Tensor]  # name of a layer or group -> one bool for each channel


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Every BatchNorm of the model by name, in the order of the forward pass."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BATCH_NORMS)}


def selections(model: nn.Module) -> dict[str, str]:
    """For each BN that is directly before a channel selection, and so keeps its width, the name of
    that selection."""
    found, norm = {}, ""
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS):
            norm = name
        elif is_selection(module) and norm:
            found[norm] = name
    return found


def present_channels(model: nn.Module) -> Masks:
    """The channels of each BN that reach the next layer: all, or those that its selection keeps."""
    masks = {
        name: torch.ones(bn.num_features, dtype=torch.bool)
        for name, bn in batch_norms(model).items()
    }
    for name, selection in selections(model).items():
        indexes = model.get_submodule(selection).indexes
        assert isinstance(indexes, torch.Tensor)
        masks[name] = indexes.detach().cpu() != 0
    return masks


def alive_channels(model: nn.Module) -> Masks:
    """The present channels whose output is not always zero: those without γ = β = 0. A BN without
    γ and β has no others."""
    alive = present_channels(model)
    for name, bn in batch_norms(model).items():
        if bn.affine:
            alive[name] &= ((bn.weight != 0) | (bn.bias != 0)).detach().cpu()
    return alive


def scaling_factors(model: nn.Module) -> dict[str, torch.Tensor]:
    """|γ| of every channel of each BN that has γ: name -> (C,) fp32 on the CPU."""
    norms = batch_norms(model).items()
    return {name: bn.weight.detach().float().cpu().abs() for name, bn in norms if bn.affine}


@torch.no_grad()
def zero_channels(model: nn.Module, keep: Masks) -> nn.Module:
    """Set γ and β of every channel that is not in ``keep`` (BN -> (C,) bool) to zero, in place;
    return the model. A BN without γ and β stays as it is."""
    for name, bn in batch_norms(model).items():
        if not bn.affine:
            continue
        mask = keep[name].to(bn.weight.device)
        bn.weight.mul_(mask)
        bn.bias.mul_(mask)
    return model
