"""The inputs and outputs of a convolution or linear layer as rows of a matrix product."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

FEATURES = 6_144  # weights of an output, at most: a regression takes their square in memory
Fitted = _ConvNd | nn.Linear


def obstacle(layer: Fitted) -> str | None:
    """Why the weights of a layer cannot be fitted, if they cannot be."""
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "its weight is computed from other parameters"
    features = matrix(layer).shape[2]
    if features > FEATURES:
        return f"each of its outputs has {features} weights, more than {FEATURES}"
    return None


def matrix(layer: Fitted) -> torch.Tensor:
    """The weights of a layer as (groups, outputs of a group, features F)."""
    if isinstance(layer, nn.Linear):
        return layer.weight[None]
    weight = layer.weight.unflatten(0, (layer.groups, -1))
    return (weight.transpose(1, 2) if layer.transposed else weight).flatten(2)


@torch.no_grad()
def add_to_weight(layer: Fitted, change: torch.Tensor) -> None:
    """Add ``change``, in the form of `matrix`, to the weights of a layer."""
    if isinstance(layer, nn.Linear):
        layer.weight += change[0]
        return
    if layer.transposed:  # stored as (inputs, outputs of a group, ...)
        taps = layer.weight[0, 0].numel()
        change = change.unflatten(2, (-1, taps)).transpose(1, 2)
    layer.weight += change.reshape(layer.weight.shape)


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a layer's output that is channels."""
    return -1 if isinstance(layer, nn.Linear) else 1


def positions(value: torch.Tensor, dim: int) -> torch.Size:
    """The shape (N, ...) of the positions of ``value``, whose dimension ``dim`` is channels."""
    return value.movedim(dim, -1).shape[:-1]


def draw(shape: torch.Size, count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """About ``count`` of the positions (N, ...) of this shape, equally many for each of N, drawn by
    ``generator``; all of them where there are no more. One index (N, P) for each dimension."""
    samples, size = shape[0], shape[1:].numel()
    places = torch.arange(size).expand(samples, size)
    if count < samples * size:
        places = torch.randint(size, (samples, -(-count // samples)), generator=generator)
    return [torch.arange(samples)[:, None].expand_as(places), *_unravelled(places, shape[1:])]


def centre(shape: torch.Size) -> list[torch.Tensor]:
    """The position in the middle of each of N, as from `draw`."""
    samples = torch.arange(shape[0])[:, None]
    return [samples, *(torch.full_like(samples, size // 2) for size in shape[1:])]


def picked(value: torch.Tensor, dim: int, places: list[torch.Tensor]) -> torch.Tensor:
    """The channels (N · P, C) of ``value``, in its dimension ``dim``, at these positions."""
    found = value.movedim(dim, -1)[tuple(index.to(value.device) for index in places)]
    return found.flatten(0, 1)


def patches(layer: Fitted, read: torch.Tensor, places: list[torch.Tensor]) -> torch.Tensor:
    """What ``layer`` reads of ``read`` (N, C, ...) for its outputs at these positions: (groups,
    N · P, F), with F as in `matrix`."""
    if isinstance(layer, nn.Linear):
        return picked(read, -1, places)[None]
    if layer.padding_mode != "zeros":
        read = F.pad(read, _reversed(_padding(layer)), layer.padding_mode)
    samples, *outputs = (place.to(read.device) for place in places)
    taps, inside, count = [], None, len(outputs)
    for d, output in enumerate(outputs):
        at, valid = _taps(layer, output, d, read.shape[2 + d])
        shape = [*output.shape, *[1] * count]
        shape[2 + d] = -1
        taps.append(at.reshape(shape))
        valid = valid.reshape(shape)
        inside = valid if inside is None else inside & valid
    where = (samples.view(*samples.shape, *[1] * count), *taps)
    rows = read.movedim(1, -1)[where]
    if inside is not None and not inside.all():
        rows = torch.where(inside[..., None], rows, 0)
    rows = rows.flatten(0, 1).flatten(1, -2)  # (N · P, taps, C)
    found = rows.mT.reshape(len(rows), layer.groups, -1)
    return found.transpose(0, 1)


def _taps(
    layer: _ConvNd, output: torch.Tensor, d: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Along the spatial dimension ``d``, which has ``size`` inputs: those (N, P, taps) that outputs
    (N, P) read, and whether they exist; others are read as zeros."""
    kernel = torch.arange(layer.kernel_size[d], device=output.device) * layer.dilation[d]
    stride = layer.stride[d]
    if layer.transposed:
        at = output[..., None] + int(layer.padding[d]) - kernel
        whole = at % stride == 0
        at = at.div(stride, rounding_mode="floor")
    else:
        left = _padding(layer)[d][0] if layer.padding_mode == "zeros" else 0
        at = output[..., None] * stride + kernel - left
        whole = torch.ones_like(at, dtype=torch.bool)
    return at.clamp(0, size - 1), whole & (at >= 0) & (at < size)


def _padding(layer: _ConvNd) -> list[tuple[int, int]]:
    """How many places are added before and behind, for each spatial dimension."""
    if isinstance(layer.padding, str):
        wide = [0] * len(layer.kernel_size)
        if layer.padding == "same":
            sizes = zip(layer.dilation, layer.kernel_size, strict=True)
            wide = [dilation * (kernel - 1) for dilation, kernel in sizes]
        return [(each // 2, each - each // 2) for each in wide]
    return [(each, each) for each in layer.padding]


def _reversed(padding: list[tuple[int, int]]) -> list[int]:
    """In the order of `torch.nn.functional.pad`: of the last dimension first."""
    return [size for pair in reversed(padding) for size in pair]


def _unravelled(places: torch.Tensor, shape: torch.Size) -> list[torch.Tensor]:
    """Flat places as one index for each dimension of ``shape``."""
    found = []
    for size in reversed(shape):
        found.append(places % size)
        places = places // size
    return found[::-1]
