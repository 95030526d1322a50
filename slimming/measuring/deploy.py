"""The deployment form of a network, for inference only: BN folded into other layers, few copies."""

import copy
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils.fusion import fuse_conv_bn_eval

from slimming.pruning.coupling import is_wired
from slimming.pruning.importance import layers
from slimming.pruning.scaling import batch_norms, present_channels, selections

if TYPE_CHECKING:
    from typing_extensions import TypeIs

GATHERING = 36  # multiplications that take as long as copying one value, on a CPU
TINY = 1e-30  # smaller scales count as 0: a division by them overflows


class _Selected(nn.Module):
    """Replaces a BN that keeps its width and the channel selection after it.

    (N, C or more, H, W) -> (N, kept, H, W), channels last. ``kept``: indices, or None for all C.
    """

    kept: torch.Tensor | None

    def __init__(self, keep: torch.Tensor) -> None:
        super().__init__()
        self.channels = len(keep)
        self.register_buffer("kept", None if keep.all() else keep.nonzero().flatten())

    def rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The kept channels as (N, H, W, kept), and an output tensor for results, if any."""
        if self.kept is None:
            return x[:, : self.channels].permute(0, 2, 3, 1), None
        rows = _gathered(x, self.kept)
        return rows, rows  # the gathered copy can be overwritten


class SelectedAffine(_Selected):
    """Gather channels, then scale and shift them: scale · x[:, kept] + shift, before a ReLU."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor, keep: torch.Tensor) -> None:
        super().__init__(keep)
        self.register_buffer("scale", scale[keep])
        self.register_buffer("shift", shift[keep])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, out = self.rows(x)
        return torch.addcmul(self.shift, rows, self.scale, out=out).permute(0, 3, 1, 2)


class SelectedClamp(_Selected):
    """BN and ReLU as one pass over the kept channels, if the next layer is linear per pixel.

    ReLU(scale · x + shift) = scale · clamp(x) + shift, with the clamp at x = -shift / scale, from
    below where scale is positive and from above where it is negative. Scale and shift of the
    clamped x are folded into the next layer: see `_fold`.
    """

    low: torch.Tensor
    high: torch.Tensor | None

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor, keep: torch.Tensor) -> None:
        super().__init__(keep)
        bend = -shift / scale
        infinite = torch.full_like(bend, torch.inf)
        self.register_buffer("low", torch.where(scale > TINY, bend, -infinite)[keep])
        high = torch.where(scale < -TINY, bend, infinite)[keep]
        self.register_buffer("high", None if (high == torch.inf).all() else high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, out = self.rows(x)
        return torch.clamp(rows, self.low, self.high, out=out).permute(0, 3, 1, 2)


class _Growing(Protocol):
    """A block of a dense stage that can compute only its new channels."""

    conv1: nn.Conv2d

    def grow(self, x: torch.Tensor) -> torch.Tensor:
        """The new channels."""


def _grows(block: object) -> "TypeIs[_Growing]":
    return hasattr(block, "grow")


class DenseStage(nn.Module):
    """The blocks of a dense stage, which write to one preallocated map: no concatenation."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        blocks = [block for block in self.blocks if _grows(block)]
        growth = blocks[0].conv1.out_channels
        maps = x.new_empty(n, h, w, c + growth * len(blocks)).permute(0, 3, 1, 2)
        maps[:, :c] = x
        for block in blocks:
            maps[:, c : c + growth] = block.grow(maps)  # reads the first c channels only
            c += growth
        return maps


@torch.no_grad()
def deploy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference only, whose outputs are equal up to rounding.

    A BN directly after the convolution that writes it is folded into that convolution. A BN before
    a channel selection is applied to the kept channels only, and becomes a clamp if the next layer
    can absorb its scale and shift. The copy is channels_last, in eval mode, and has no BatchNorm
    left: it cannot be trained or pruned. ValueError if ``model`` has no BatchNorm. In a network
    without ``wiring()`` each BN after a convolution is folded, if torch.fx can trace the network
    and no such layer runs twice.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    >>> images = torch.rand(1, 3, 8, 8)
    >>> torch.allclose(deploy(net)(images), net(images), atol=1e-5)
    True
    """
    if not is_wired(model):
        return _fused(model).requires_grad_(False).to(memory_format=torch.channels_last)
    if not batch_norms(model):
        raise ValueError("the model has no BatchNorm: it is already in deployment form")
    present, whole = present_channels(model), selections(model)
    small = copy.deepcopy(model).eval()
    norms = batch_norms(small)
    for wire in model.wiring():
        if wire.writes:
            conv = small.get_submodule(wire.layer)
            assert isinstance(conv, nn.Conv2d)  # the writer of a BatchNorm2d
            small.set_submodule(wire.layer, fuse_conv_bn_eval(conv, norms[wire.writes]))
            small.set_submodule(wire.writes, nn.Identity())
    for name, selection in whole.items():
        keep = present[name].to(next(model.parameters()).device)
        readers = [wire.layer for wire in model.wiring() if wire.reads == name]
        _merge(small, name, selection, readers, keep)
    for name, module in list(small.named_modules()):
        if isinstance(module, nn.Sequential) and _grows(next(iter(module), None)):
            small.set_submodule(name, DenseStage(module))
    return small.requires_grad_(False).to(memory_format=torch.channels_last)


def _fused(model: nn.Module) -> nn.Module:
    """A copy in eval mode with BN fused into convolutions, if torch.fx can trace the network."""
    still = copy.deepcopy(model).eval()
    try:
        nodes = torch.fx.symbolic_trace(still).graph.nodes
        called = [still.get_submodule(n.target) for n in nodes if n.op == "call_module"]
        folded = [layer for layer in called if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))]
        if len(folded) > len(set(folded)):  # a convolution that runs twice may have two BNs
            return still
        return optimization.fuse(still)
    except Exception:  # data-dependent control flow, or anything else that cannot be traced
        return still


def _gathered(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """x[:, kept] of a (N, C, H, W) batch as (N, H, W, kept)."""
    pixels = x.permute(0, 2, 3, 1)
    if not pixels.is_contiguous():
        return x.index_select(1, kept).permute(0, 2, 3, 1)
    rows = pixels.flatten(0, 2)  # a view; gathering columns is fast
    return rows.gather(1, kept.expand(len(rows), -1)).view(*pixels.shape[:3], -1)


def _merge(
    small: nn.Module, name: str, selection: str, reading: list[str], keep: torch.Tensor
) -> None:
    """Replace the BN ``name``, its selection and, if the ``reading`` layers can absorb its scale
    and shift, its ReLU by one module."""
    bn = batch_norms(small)[name]
    assert bn.running_var is not None and bn.running_mean is not None  # inference needs both
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    shift = bn.bias - bn.running_mean * scale
    found = layers(small)
    readers = [found[layer] for layer in reading]
    work = sum(reader.weight[:, 0].numel() for reader in readers)  # multiplications a channel
    kept = int(keep.sum())
    if (len(keep) - kept) * work < GATHERING * kept:  # multiplying by zeros is faster
        for reader in readers:
            _read_all(reader, keep)
        keep = torch.ones_like(keep)
    merged: type[SelectedAffine | SelectedClamp] = SelectedAffine
    if all(map(_linear_per_pixel, readers)):
        for reader in readers:
            _fold(reader, scale[keep], shift[keep])
        merged = SelectedClamp
        small.set_submodule(selection.replace("select", "relu"), nn.Identity())
    small.set_submodule(name, merged(scale, shift, keep))
    small.set_submodule(selection, nn.Identity())


def _linear_per_pixel(reader: nn.Module) -> bool:
    """Whether each output pixel depends on one input pixel: a constant stays constant."""
    if isinstance(reader, nn.Conv2d):
        return reader.kernel_size == (1, 1) and reader.padding == (0, 0) and reader.groups == 1
    return isinstance(reader, nn.Linear)


def _read_all(reader: nn.Conv2d | nn.Linear, keep: torch.Tensor) -> None:
    """Let ``reader`` read every channel, with zero weights for those that are not in ``keep``."""
    weight = reader.weight
    wide = weight.new_zeros(weight.shape[0], len(keep), *weight.shape[2:])
    wide[:, keep] = weight
    reader.weight = nn.Parameter(wide)
    if isinstance(reader, nn.Linear):
        reader.in_features = len(keep)
    else:
        reader.in_channels = len(keep)


def _fold(reader: nn.Conv2d | nn.Linear, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Fold scale · x + shift, or ReLU(shift) where the scale is 0, into ``reader``."""
    live = scale.abs() > TINY
    constant = torch.where(live, shift, F.relu(shift))
    weight = reader.weight
    bias = weight.flatten(1) @ constant + (0 if reader.bias is None else reader.bias)
    scaled = weight.transpose(1, -1) * torch.where(live, scale, 0)
    reader.weight, reader.bias = nn.Parameter(scaled.transpose(1, -1)), nn.Parameter(bias)
