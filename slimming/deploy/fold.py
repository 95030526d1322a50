"""The deployment form of a network, for inference only: BN folded into other layers, few copies."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from slimming.channels import inputs as arguments
from slimming.channels.groups import copied, lists_widths, wires, with_selections
from slimming.channels.inputs import Inputs
from slimming.channels.recording import ROOT, Recording
from slimming.channels.scaling import batch_norms, present_channels, selections
from slimming.choosing.importance import layers
from slimming.deploy.forms import DEPLOYED, FORMS, TINY, Form, SelectedAffine, SelectedClamp
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.runtime.device import LAYOUT
from slimming.slicing import unread
from slimming.slicing.proof import TOLERANCE, compared, where
from slimming.slicing.prune import together
from slimming.slicing.unread import without_unread_channels

Pair = tuple[str, str]  # the names of a layer and of the BN that is folded into it
FOLDING = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}
FOLDING |= {nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
FOLDED = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
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
    inputs: Inputs | torch.dtype | None = None,
    dtype: torch.dtype | Form = torch.float32,
    form: Form = DEPLOYED,
    images: torch.Tensor | None = None,
) -> nn.Module:
    """A copy of ``model`` for inference only, whose outputs are equal up to rounding.

    A BN directly after the convolution that writes it is folded into that convolution. A BN before
    a channel selection is applied to the kept channels only, and becomes a clamp if the next layer
    can absorb its scale and shift; channels that every selection drops are removed from the layers
    that write them. The copy is in eval mode, and has no such BatchNorm left: it cannot be trained
    or pruned. With a ``dtype`` such as torch.bfloat16 it computes in that precision, and still
    reads images and returns logits in fp32. ``form``: see `slimming.deploy.forms`.

    ``inputs`` are a tensor (N, ...), a tuple of arguments or a dict of them, as the network reads
    them. With them each BN of any other network is folded into the convolution, transposed ones
    too, or linear layer that it alone reads, as a run shows, if both run once; and the result is
    proved: its outputs are equal, or UserError. What is not exact is not folded. Without inputs
    BNs are folded into Conv2d if torch.fx can trace the network.
    Weights are channels_last, which is fastest, unless the network views a map, or, with
    ``inputs``, unless it fails in that layout. ValueError if one of the paper's networks has no BN,
    or for another ``dtype`` than float32, bfloat16 and float16 (which is slow on CPUs).
    UserError if the network fails on ``inputs``. ``images`` is the former name of ``inputs``, and
    `deploy(model, dtype, form)` the former order.

    >>> net = nn.Sequential(nn.Conv1d(3, 8, 3, bias=False), nn.BatchNorm1d(8)).eval()
    >>> signals = torch.rand(1, 3, 8)
    >>> deploy(net, signals)
    Sequential(
      (0): Conv1d(3, 8, kernel_size=(3,), stride=(1,))
      (1): Identity()
    )
    >>> deploy(net, dtype=torch.bfloat16)(signals).dtype
    torch.float32
    """
    model = arguments.network(model)
    if isinstance(inputs, torch.dtype):
        form = dtype if isinstance(dtype, Form) else form
        dtype, inputs = inputs, None
    inputs = images if inputs is None else inputs
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype!r}")
    assert isinstance(dtype, torch.dtype)  # one of `DTYPES`
    if dtype == torch.float16 and form.clamp:  # where a clamp is at large values, fp16 overflows
        form = replace(form, clamp=False)
    if not form.fold:
        small = copied(model).eval()
    else:
        small = _merged(model, form) if lists_widths(model) else _folded(model, inputs)
    small = small.requires_grad_(False).to(memory_format=_layout(model, inputs))
    if inputs is not None:
        _prove(small, model, inputs)
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
    small = copied(model).eval()
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
        return unread.trace(model)
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


def _folded(model: nn.Module, inputs: Inputs | None) -> nn.Module:
    """A copy in eval mode with BNs folded into the layers that they read."""
    still = copied(model).eval()
    if inputs is None:
        return _without(still, _traced_pairs(still))
    pairs = _recorded_pairs(still, inputs)

    def exact(pairs: list[Pair]) -> bool:
        return compared(_without(still, pairs), still, inputs) <= TOLERANCE

    return _without(still, together(pairs, exact))


def _without(still: nn.Module, pairs: list[Pair]) -> nn.Module:
    """A copy in which the BNs of these pairs are folded into their layers."""
    small = copied(still)
    for name, behind in pairs:
        layer, norm = small.get_submodule(name), small.get_submodule(behind)
        small.set_submodule(name, fold(layer, norm))
        small.set_submodule(behind, nn.Identity())
    return small


def fold(layer: Any, norm: Any) -> nn.Module:
    """A copy of a convolution or linear layer that computes what ``norm`` returns for its output,
    in eval mode."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale * norm.weight if norm.affine else scale
    shift = -norm.running_mean * scale
    shift = shift + norm.bias if norm.affine else shift
    folded, weight = copied(layer), layer.weight
    taps = [1] * (weight.dim() - 2)
    if getattr(layer, "transposed", False):  # (inputs, outputs of a group, ...)
        grouped = weight.unflatten(0, (layer.groups, -1))
        weight = (grouped * scale.view(layer.groups, 1, -1, *taps)).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, 1, *taps)
    bias = shift if layer.bias is None else shift + layer.bias * scale
    folded.weight = nn.Parameter(weight.to(layer.weight.dtype))
    folded.bias = nn.Parameter(bias.to(layer.weight.dtype))
    return folded


def _recorded_pairs(still: nn.Module, inputs: Inputs) -> list[Pair]:
    """Each layer with the BN that alone reads what it puts out, where nothing else uses their
    tensors, and each runs once."""
    device, dtype = where(still)
    try:
        one = arguments.like(arguments.first(inputs, 1), device, dtype)
        seen = Recording(still, {}).run(arguments.mapped(one, torch.clone))
    except Exception as error:  # in the forward pass of the network
        raise_if_of_the_machine(error)
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{type(still).__name__} fails on these inputs ({type(error).__name__}: {reason}): "
            "pass inputs that it takes: a tensor, a tuple of arguments, or a dict of them"
        ) from error
    runs = Counter(call.key.name for call in seen.calls)
    read_by = {call.reads[0]: call for call in seen.calls if len(call.reads) == 1}
    pairs = []
    for call in seen.calls:
        behind = read_by.get(call.writes[0]) if len(call.writes) == 1 else None
        if behind is None or runs[call.key.name] > 1 or runs[behind.key.name] > 1:
            continue
        pair = call.key.name, behind.key.name
        used = [(call.writes[0], pair[1])]
        for name in pair:
            used += [(value, name) for value in seen.tensors.get(name, [])]
        alone = all(
            reader != ROOT and seen.calls[reader].key.name == name
            for value, name in used
            for reader in seen.readers[value]
        )
        if alone and _may_fold(*map(still.get_submodule, pair)):
            pairs.append(pair)
    return pairs


def _may_fold(layer: Any, norm: Any) -> bool:
    """Whether both are what their classes say: a subclass may compute something else."""
    known = type(layer) in FOLDING and type(norm) in FOLDED
    if not known or norm.running_mean is None or any(map(_has_hooks, (layer, norm))):
        return False
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return bool(norm.num_features == outputs)


def _traced_pairs(still: nn.Module) -> list[Pair]:
    """Each Conv2d with the BN that can be folded into it, if torch.fx can trace the network."""
    try:
        traced = fx.symbolic_trace(still)
    except Exception as error:  # data-dependent control flow, or what else cannot be traced
        raise_if_of_the_machine(error)
        return []
    uses = Counter(_uses(traced))
    nodes = [node for node in traced.graph.nodes if _folds(traced, node, uses)]
    return [(str(node.all_input_nodes[0].target), str(node.target)) for node in nodes]


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
    alone = len(source.users) == uses[conv] == uses[norm] == 1
    return type(conv) is nn.Conv2d and alone and _may_fold(conv, norm)


def _has_hooks(layer: nn.Module) -> bool:
    """Whether a hook may change what the layer computes, as weight_norm and torch.nn.utils.prune
    do. No public attribute says so."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks)  # noqa: SLF001


def _layout(model: nn.Module, inputs: Inputs | None) -> torch.memory_format:
    """The fastest memory layout in which the network runs."""
    if inputs is None:
        try:
            views = any(node.target == "view" for node in unread.trace(model).nodes)
        except UserError:
            views = True  # perhaps: contiguous always works
        flat = all(p.dim() < 5 for p in model.parameters())  # volumes have another layout
        return torch.contiguous_format if views or not flat else LAYOUT
    device, dtype = where(model)
    one = arguments.mapped(
        arguments.like(arguments.first(inputs, 1), device, dtype),
        lambda t: t.clone(memory_format=LAYOUT if t.dim() == 4 else torch.preserve_format),
    )
    try:
        arguments.call(copied(model).to(memory_format=LAYOUT).eval(), one)
    except RuntimeError as error:
        raise_if_of_the_machine(error)
        return torch.contiguous_format
    return LAYOUT


def _prove(deployed: nn.Module, model: nn.Module, inputs: Inputs) -> None:
    """UserError if the outputs differ by more than 1e-4 of the largest."""
    difference = compared(deployed, model, inputs)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the deployment form differs from the network by {difference:.1e} of the largest "
            f"output (allowed: {TOLERANCE:.0e}): use the network itself, and report this bug"
        )


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
