"""The deployment form of a network, for inference only: BN folded into other layers, few copies."""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils.fusion import fuse_conv_bn_eval

from slimming.measuring.forms import (
    DEPLOYED,
    FORMS,
    TINY,
    Form,
    SelectedAffine,
    SelectedClamp,
)
from slimming.pruning.coupling import is_wired
from slimming.pruning.importance import layers
from slimming.pruning.scaling import batch_norms, present_channels, selections
from slimming.pruning.unread import without_unread_channels
from slimming.runtime.failures import raise_if_of_the_machine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class InPrecision(nn.Module):
    """``model`` in a lower precision; images and logits stay fp32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.to(self.dtype)).float()


@torch.no_grad()
def deploy(
    model: nn.Module, dtype: torch.dtype = torch.float32, form: Form = DEPLOYED
) -> nn.Module:
    """A copy of ``model`` for inference only, whose outputs are equal up to rounding.

    A BN directly after the convolution that writes it is folded into that convolution. A BN before
    a channel selection is applied to the kept channels only, and becomes a clamp if the next layer
    can absorb its scale and shift; channels that every selection drops are removed from the layers
    that write them. The copy is channels_last, in eval mode, and has no BatchNorm left: it cannot
    be trained or pruned. With a ``dtype`` such as torch.bfloat16 it computes in that precision, and
    still reads images and returns logits in fp32. ``form``: see `slimming.measuring.forms`.
    In a network without ``wiring()`` each BN after a convolution is folded, if torch.fx can trace
    the network and no such layer runs twice. ValueError if a network with ``wiring()`` has no BN,
    or for another ``dtype`` than float32, bfloat16 and float16 (which is slow on CPUs).

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    >>> images = torch.rand(1, 3, 8, 8)
    >>> torch.allclose(deploy(net)(images), net(images), atol=1e-5)
    True
    >>> deploy(net, torch.bfloat16)(images).dtype
    torch.float32
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype!r}")
    if dtype == torch.float16 and form.clamp:  # where a clamp is at large values, fp16 overflows
        form = replace(form, clamp=False)
    if not form.fold:
        small = copy.deepcopy(model).eval()
    else:
        small = _merged(model, form) if is_wired(model) else _fused(model)
    small = small.requires_grad_(False).to(memory_format=torch.channels_last)
    return small if dtype == torch.float32 else InPrecision(small, dtype).eval()


def forms_of(model: nn.Module) -> dict[str, Form]:
    """The `FORMS` by name that differ for ``model``: without dropped channels, some are equal."""
    present = present_channels(model)
    keeps = [present[name] for name in selections(model)]
    if not keeps:
        names = ["plain", "folded"]
    elif all(keep.all() for keep in keeps):
        names = ["plain", "folded", "clamp"]
    else:
        names = [name for name in FORMS if name != "folded"]
    return {name: FORMS[name] for name in names}


def _merged(model: nn.Module, form: Form) -> nn.Module:
    """A copy of a network with ``wiring()`` without BN."""
    if not batch_norms(model):
        raise ValueError("the model has no BatchNorm: it is already in deployment form")
    if any(not keep.all() for keep in present_channels(model).values()):
        model = without_unread_channels(model)
    assert is_wired(model)
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
        _merge(small, name, selection, readers, keep, form)
    return small


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
    except Exception as error:  # data-dependent control flow, or what else cannot be traced
        raise_if_of_the_machine(error)
        return still


def _merge(
    small: nn.Module,
    name: str,
    selection: str,
    reading: list[str],
    keep: torch.Tensor,
    form: Form,
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
    if not form.gathers(len(keep) - kept, kept, work):
        for reader in readers:
            _read_all(reader, keep)
        keep = torch.ones_like(keep)
    merged: type[SelectedAffine | SelectedClamp] = SelectedAffine
    if form.clamp and all(map(_linear_per_pixel, readers)):
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
