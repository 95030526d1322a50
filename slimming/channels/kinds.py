"""Kinds of layers: which dimension of which of their tensors are channels, and which attributes say
how many. One entry for each kind; `register` adds one for a layer of one's own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from slimming.channels.inputs import tensors
from slimming.channels.labels import Trace

Shape = Sequence[int]
Attributes = Callable[[Any, Shape], dict[str, int]]


class Kind(NamedTuple):
    """``out`` and ``into``: the dimension that is channels which the layer writes and reads, by the
    name of the tensor, the one that always exists first; ``attributes(layer, shape)``: the numbers
    that the layer holds, where that tensor has another shape."""

    out: dict[str, int]
    into: dict[str, int]
    attributes: Attributes


Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed
BATCH_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
STATISTICS = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
KINDS: dict[type[nn.Module] | tuple[type[nn.Module], ...], Kind] = {}


def register(
    layer: type[nn.Module] | tuple[type[nn.Module], ...],
    out: dict[str, int],
    into: dict[str, int] | None = None,
    attributes: Attributes = lambda layer, shape: {},
) -> None:
    """Add a kind of layer, whose operations have rules (`slimming.channels.operations`):

    >>> class Scale(nn.Module):  # scales each channel
    ...     def __init__(self, channels):
    ...         super().__init__()
    ...         self.channels, self.scale = channels, nn.Parameter(torch.ones(channels, 1, 1))
    >>> register(Scale, {"scale": 0}, attributes=lambda layer, shape: {"channels": shape[0]})
    >>> kind_of(Scale(8)).out
    {'scale': 0}
    """
    KINDS[layer] = Kind(out, into or {}, attributes)


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer, None if its channels are in none of the `KINDS`."""
    if is_depthwise(layer):
        return DEPTHWISE
    found = [kind for cls, kind in KINDS.items() if isinstance(layer, cls)]
    return found[-1] if found else None


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a convolution reads one channel for each filter, the same number of filters each; a
    transposed one if it has as many filters as channels."""
    if not isinstance(layer, Convolution) or layer.groups == 1 or layer.groups != layer.in_channels:
        return False
    return not layer.transposed or layer.in_channels == layer.out_channels


def _depthwise(layer: Convolution, shape: Shape) -> dict[str, int]:
    groups = shape[0] * layer.groups // layer.out_channels
    return {"out_channels": shape[0], "in_channels": groups, "groups": groups}


def _convolution(layer: Convolution, shape: Shape) -> dict[str, int]:
    return {"out_channels": shape[0], "in_channels": shape[1] * layer.groups}


def _transposed(layer: Convolution, shape: Shape) -> dict[str, int]:
    return {"in_channels": shape[0], "out_channels": shape[1] * layer.groups}


def _group_norm(layer: nn.GroupNorm, shape: Shape) -> dict[str, int]:
    groups = layer.num_groups * shape[0] // layer.num_channels
    return {"num_channels": shape[0], "num_groups": groups}


DEPTHWISE = Kind({"weight": 0, "bias": 0}, {}, _depthwise)
register(get_args(Convolution), {"weight": 0, "bias": 0}, {"weight": 1}, _convolution)
register(get_args(Transposed), {"weight": 1, "bias": 0}, {"weight": 0}, _transposed)
register(
    nn.Linear,
    {"weight": 0, "bias": 0},
    {"weight": 1},
    lambda layer, shape: {"out_features": shape[0], "in_features": shape[1]},
)
register(BATCH_NORMS, STATISTICS, {}, lambda layer, shape: {"num_features": shape[0]})
register(nn.GroupNorm, {"weight": 0, "bias": 0}, {}, _group_norm)
register(nn.PReLU, {"weight": 0}, {}, lambda layer, shape: {"num_parameters": shape[0]})
register(nn.Embedding, {"weight": 1}, {}, lambda layer, shape: {"embedding_dim": shape[1]})

# Modules that are followed as a whole: each with what it does to labels.
Opaque = Callable[[Trace, nn.Module, list[Any], Any], None]
OPAQUE: dict[type[nn.Module] | tuple[type[nn.Module], ...], Opaque] = {}


def opaque(*layers: type[nn.Module]) -> Callable[[Opaque], Opaque]:
    """Register what modules of these classes do to labels, as ``rule(trace, module, inputs,
    output)``: their operations are not followed."""

    def add(function: Opaque) -> Opaque:
        OPAQUE[layers] = function
        return function

    return add


@opaque(nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
def stays(trace: Trace, module: nn.Module, inputs: list[Any], output: Any) -> None:
    """Attention and recurrent layers keep all channels that they read and write."""
    for tensor in tensors(inputs):
        trace.pin(trace.of(tensor), type(module).__name__)


def is_selection(layer: nn.Module) -> bool:
    """Whether a layer selects the channels where its ``indexes`` are not 0."""
    return isinstance(getattr(layer, "indexes", None), torch.Tensor)


def select(trace: Trace, module: nn.Module, inputs: list[Any], output: Any) -> None:
    """A channel selection is a gate: what it reads stays, and its outputs have labels of their own,
    so that what follows can stop reading a channel that others still need."""
    indexes: Any = module.indexes
    present = indexes.detach().cpu() != 0
    trace.pin(trace.of(inputs[0]), "read by a channel selection")
    name = trace.module
    if name not in trace.gates:
        trace.gates[name] = (trace.fresh(len(present)), present)
    labels = trace.gates[name][0][present]
    trace.put(output, labels.view(-1, *[1] * (output.dim() - 2)).expand(output.shape))


def put(layer: nn.Module, part: str, tensor: torch.Tensor) -> None:
    """Put a parameter or buffer of another shape into a layer, and set its attributes."""
    kind = kind_of(layer)
    # its own tensors alone: a weight that is computed of two, one of which is sliced, is none yet
    own = {
        **dict(layer.named_parameters(recurse=False)),
        **dict(layer.named_buffers(recurse=False)),
    }
    leading = next((p for p in kind.out if p in own), None) if kind else None
    if kind and kind.into and leading not in kind.into:
        leading = None
    numbers = kind.attributes(layer, tensor.shape) if kind and part == leading else {}
    setattr(layer, part, tensor)
    for attribute, value in numbers.items():
        setattr(layer, attribute, value)
