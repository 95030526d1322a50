"""The deployment form of a network, for inference only: BN folded into other layers, few copies."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from slimming.channels.groups import lists_widths, with_selections
from slimming.channels.scaling import batch_norms, present_channels, selections
from slimming.channels.wires import wires
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.measuring.forms import (
    DEPLOYED,
    FORMS,
    TINY,
    Form,
    SelectedAffine,
    SelectedClamp,
)
from slimming.pruning import activations
from slimming.pruning.importance import layers
from slimming.pruning.slicing.proof import TOLERANCE
from slimming.pruning.unread import without_unread_channels
from slimming.runtime.device import LAYOUT, layout_for

AVERAGES = ("mean", torch.mean, F.adaptive_avg_pool2d, torch.flatten, "flatten")
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
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    form: Form = DEPLOYED,
    images: torch.Tensor | None = None,
) -> nn.Module:
    """A copy of ``model`` for inference only, whose outputs are equal up to rounding.

    A BN directly after the convolution that writes it is folded into that convolution. A BN before
    a channel selection is applied to the kept channels only, and becomes a clamp if the next layer
    can absorb its scale and shift; channels that every selection drops are removed from the layers
    that write them. The copy is in eval mode, and has no such BatchNorm left: it cannot be trained
    or pruned. With a ``dtype`` such as torch.bfloat16 it computes in that precision, and still
    reads images and returns logits in fp32. ``form``: see `slimming.measuring.forms`.

    In any other network each BN after a convolution is folded, if torch.fx can trace
    the network, nothing else uses what the two compute with, and they run once. With ``images``
    (N, C, H, W), normalised, the result is proved on them: its outputs are equal, or UserError.
    Weights are channels_last, which is fastest, unless the network views a map, or, with
    ``images``, unless it fails in that layout. ValueError if one of the paper's networks has no BN,
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
        small = _merged(model, form) if lists_widths(model) else _fused(model)
    if images is not None:
        _prove(small, model, images)
    small = small.requires_grad_(False).to(memory_format=_layout(model, images))
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
    """A copy of one of the paper's networks without BN."""
    if not batch_norms(model):
        raise ValueError("the model has no BatchNorm: it is already in deployment form")
    if any(not keep.all() for keep in present_channels(model).values()):
        model = without_unread_channels(model)
    model = with_selections(model)
    found = wires(model)
    present, whole = present_channels(model), selections(model)
    small = copy.deepcopy(model).eval()
    norms, graph = batch_norms(small), _graph(model)
    for wire in found:
        if wire.writes and norms[wire.writes].running_mean is not None:
            conv = small.get_submodule(wire.layer)
            assert isinstance(conv, nn.Conv2d)  # the writer of a BatchNorm2d
            small.set_submodule(wire.layer, fuse_conv_bn_eval(conv, norms[wire.writes]))
            small.set_submodule(wire.writes, nn.Identity())
    for name, selection in whole.items():
        if norms[name].running_mean is None:
            continue
        keep = present[name].to(next(model.parameters()).device)
        readers = [wire.layer for wire in found if wire.reads == name]
        relu = _only_relu(small, graph, selection, readers) if graph else None
        _merge(small, name, selection, relu, readers, keep, form)
    return small


def _graph(model: nn.Module) -> fx.Graph | None:
    """The operations of a network, if torch.fx can trace it."""
    try:
        return activations.trace(model)
    except UserError:
        return None


def _only_relu(model: nn.Module, graph: fx.Graph, last: str, readers: list[str]) -> str | None:
    """The name of the ReLU layer behind ``last``, a BN or its channel selection, if it runs nowhere
    else, and only the ``readers`` use its output, directly or averaged."""
    called = [model.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"]
    behind = [user for n in graph.nodes if n.target == last for user in n.users]
    if len(behind) != 1 or behind[0].op != "call_module":
        return None
    name = str(behind[0].target)
    relu, left = model.get_submodule(name), list(behind[0].users)
    if not isinstance(relu, nn.ReLU) or called.count(relu) > 1:
        return None
    while left:
        user = left.pop()
        if user.target in AVERAGES:
            left += user.users
        elif user.op != "call_module" or user.target not in readers:
            return None
    return name


def _fused(model: nn.Module) -> nn.Module:
    """A copy in eval mode with BN folded into convolutions, if torch.fx can trace the network."""
    still = copy.deepcopy(model).eval()
    try:
        traced = fx.symbolic_trace(still)
    except Exception as error:  # data-dependent control flow, or what else cannot be traced
        raise_if_of_the_machine(error)
        return still
    uses = Counter(_uses(traced))
    pairs = [node for node in traced.graph.nodes if _folds(traced, node, uses)]
    for node in pairs:
        conv = node.all_input_nodes[0]
        layer, norm = (traced.get_submodule(str(n.target)) for n in (conv, node))
        assert isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)  # see `_folds`
        traced.set_submodule(str(conv.target), fuse_conv_bn_eval(layer, norm))
        node.replace_all_uses_with(conv)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced if pairs else still


def _uses(traced: fx.GraphModule) -> Iterator[nn.Module]:
    """Each layer, as often as it is called or the forward pass reads one of its tensors."""
    for node in traced.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            name = str(node.target)
            owner = name if node.op == "call_module" else name.rpartition(".")[0]
            yield traced.get_submodule(owner)


def _folds(traced: fx.GraphModule, node: fx.Node, uses: Mapping[nn.Module, int]) -> bool:
    """Whether ``node`` is a BN that can be folded into the convolution whose output it reads."""
    if node.op != "call_module" or [n.op for n in node.all_input_nodes] != ["call_module"]:
        return False
    (source,) = node.all_input_nodes
    conv, norm = (traced.get_submodule(str(n.target)) for n in (source, node))
    return (
        type(conv) is nn.Conv2d  # a subclass may compute something else
        and type(norm) is nn.BatchNorm2d
        and norm.running_mean is not None
        and len(source.users) == uses[conv] == uses[norm] == 1
        and not any(map(_has_hooks, (conv, norm)))
    )


def _has_hooks(layer: nn.Module) -> bool:
    """Whether a hook may change what the layer computes, as weight_norm and torch.nn.utils.prune
    do. No public attribute says so."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks)  # noqa: SLF001


def _layout(model: nn.Module, images: torch.Tensor | None) -> torch.memory_format:
    if images is not None:
        return layout_for(model, images[:1])
    try:
        views = any(node.target == "view" for node in activations.trace(model).nodes)
    except UserError:
        views = True  # perhaps: contiguous always works
    flat = all(p.dim() < 5 for p in model.parameters())  # 3d convolutions have another layout
    return torch.contiguous_format if views or not flat else LAYOUT


def _prove(deployed: nn.Module, model: nn.Module, images: torch.Tensor) -> None:
    """UserError if the outputs differ by more than 1e-4 of the largest."""
    still = copy.deepcopy(model).eval()
    ours, theirs = (_tensors(m(images.clone())) for m in (deployed, still))
    for a, b in zip(ours, theirs, strict=True):
        difference = float((a - b).abs().max() / b.abs().max().clamp_min(TINY))
        if not difference <= TOLERANCE:
            raise UserError(
                f"the deployment form differs from the network by {difference:.1e} of the largest "
                f"output (allowed: {TOLERANCE:.0e}): use the network itself, and report this bug"
            )


def _tensors(outputs: object) -> list[torch.Tensor]:
    """All floating-point tensors in nested dicts, lists and tuples."""
    if isinstance(outputs, torch.Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [t for o in outputs for t in _tensors(o)] if isinstance(outputs, list | tuple) else []


def _merge(
    small: nn.Module,
    name: str,
    last: str,
    relu: str | None,
    reading: list[str],
    keep: torch.Tensor,
    form: Form,
) -> None:
    """Replace the BN ``name`` and ``last``, its selection if it has one, by one module; and its
    ReLU ``relu``, if there is one that nothing else needs and the ``reading`` layers can absorb the
    scale and shift."""
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
    if form.clamp and relu and all(map(_linear_per_pixel, readers)):
        for reader in readers:
            _fold(reader, scale[keep], shift[keep])
        merged = SelectedClamp
        small.set_submodule(relu, nn.Identity())
    small.set_submodule(last, nn.Identity())
    small.set_submodule(name, merged(scale, shift, keep))


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
