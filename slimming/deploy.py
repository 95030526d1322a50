"""The form of a network for inference only: BN folded away, and only kept channels touched."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.channel_selection import gather_channels
from slimming.pruning import present_channels, selections


class SelectedAffine(nn.Module):
    """Gather channels, then scale and shift them: a selection and the BN before it, in one.

    (N, C, H, W) -> (N, len(kept), H, W): x[:, kept] · scale + shift, where scale = γ / sqrt(σ² + ε)
    and shift = β - μ · scale of the kept channels.
    """

    def __init__(self, bn: nn.BatchNorm2d, keep: torch.Tensor):
        super().__init__()
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        shift = bn.bias - bn.running_mean * scale
        kept = None if keep.all() else keep.nonzero().flatten()
        self.register_buffer("kept", kept)
        self.register_buffer("scale", scale.detach()[keep])
        self.register_buffer("shift", shift.detach()[keep])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = x if self.kept is None else gather_channels(x, self.kept)
        rows = own.permute(0, 2, 3, 1)  # channels last in shape, for scale and shift of one axis
        target = None if self.kept is None else rows  # what was gathered is nobody else's
        return torch.addcmul(self.shift, rows, self.scale, out=target).permute(0, 3, 1, 2)


@torch.no_grad()
def deploy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference only, with outputs equal within rounding.

    A BN right behind the convolution that writes it is folded into that convolution. A BN in front
    of channel selection works on the kept channels alone. The copy is channels_last, in eval mode,
    and has no BatchNorm left: it cannot be trained or pruned.
    """
    present, whole = present_channels(model), selections(model)
    small = copy.deepcopy(model).eval()
    for layer, _, writes in model.wiring():
        if writes:
            fused = fuse_conv_bn_eval(small.get_submodule(layer), small.get_submodule(writes))
            small.set_submodule(layer, fused)
            small.set_submodule(writes, nn.Identity())
    for name, selection in whole.items():
        keep = present[name].to(next(model.parameters()).device)
        small.set_submodule(name, SelectedAffine(small.get_submodule(name), keep))
        small.set_submodule(selection, nn.Identity())
    return small.requires_grad_(False).to(memory_format=torch.channels_last)
