"""Networks that declare with ``wiring()`` which layer reads and writes which BN."""

import copy

import torch
from torch import nn

from slimming.pruning.scaling import Masks, batch_norms, present_channels, selections


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
