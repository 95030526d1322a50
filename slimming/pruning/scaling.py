"""The scaling factors γ of a network, and which channels are alive."""

import torch
from torch import nn

from slimming.pruning.coupling import is_wired
from slimming.pruning.widths import BATCH_NORMS, BatchNorm

Masks = dict[str, torch.Tensor]  # name of a layer or group -> one bool for each channel


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Every BatchNorm2d of the model by name, in the order of the forward pass."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BATCH_NORMS)}


def selections(model: nn.Module) -> dict[str, str]:
    """For each BN that keeps its width, because no layer writes it, the name of the channel
    selection after it.

    The ``wiring()`` of the network declares which layer reads and writes which BN; a network
    without it has no selections.
    """
    if not is_wired(model):
        return {}
    written = {wire.writes for wire in model.wiring()}
    return {
        name: f"{name.rpartition('.')[0]}.select".lstrip(".")
        for name in batch_norms(model)
        if name not in written
    }


def present_channels(model: nn.Module) -> Masks:
    """The channels of each BN that reach the next layer: all, or those that its selection keeps."""
    masks = {
        name: torch.ones(bn.num_features, dtype=torch.bool)
        for name, bn in batch_norms(model).items()
    }
    layers = dict(model.named_modules())
    for name, selection in selections(model).items():
        indexes = getattr(layers.get(selection), "indexes", None)
        if isinstance(indexes, torch.Tensor):  # the mask implementation has no selection
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
