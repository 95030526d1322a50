"""Resize the layers of a dense network to the widths of a slim one, to rebuild a pruned network."""

import torch
from torch import nn

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
LAYERS = (nn.Conv2d, nn.Linear, *BATCH_NORMS, nn.PReLU)
Layer = nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.SyncBatchNorm | nn.PReLU


def widths(model: nn.Module) -> dict[str, list[int]]:
    """The ``cfg`` of the network: the widths of each layer with channels, by name: [in, out] of a
    Conv2d or Linear, [channels] of a BatchNorm2d or PReLU.

    >>> widths(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    {'0': [3, 8], '1': [8]}
    """
    layers = model.named_modules()
    return {name: _widths(layer) for name, layer in layers if isinstance(layer, LAYERS)}


def resize(model: nn.Module, cfg: dict[str, list[int]]) -> nn.Module:
    """Resize each layer in ``cfg`` (see `widths`) to its widths, in place; return the model.

    These layers get random weights, with the same device and dtype; everything else is unchanged. A
    depthwise convolution gets as many groups as channels; any other grouped convolution keeps its
    groups. ValueError, with the model unchanged, if a name is not such a layer, if widths are not
    integers from 1 to those of the dense layer, or if the groups do not divide them.

    >>> resize(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), {"0": [5, 5]})[0]
    Conv2d(5, 5, kernel_size=(3, 3), stride=(1, 1), groups=5)
    """
    if not isinstance(cfg, dict):
        raise ValueError(f"cfg must be a dict of layer names and their widths, not {cfg!r}")
    layers = dict(model.named_modules())
    fits = [(_check(name, layers.get(name), shape), shape) for name, shape in cfg.items()]
    for layer, shape in fits:
        _set_widths(layer, shape)
    return model


def _widths(layer: Layer) -> list[int]:
    if isinstance(layer, nn.Conv2d):
        return [layer.in_channels, layer.out_channels]
    if isinstance(layer, nn.Linear):
        return [layer.in_features, layer.out_features]
    return [layer.num_features if isinstance(layer, BATCH_NORMS) else layer.num_parameters]


def _check(name: str, layer: nn.Module | None, shape: list[int]) -> Layer:
    """``layer``, if it can have the widths ``shape``; else ValueError."""
    if not isinstance(layer, LAYERS):
        raise ValueError(f"cfg has {name!r}, which is not a layer with channels in this network")
    dense = _widths(layer)
    if not isinstance(shape, list) or len(shape) != len(dense):
        raise ValueError(f"cfg has {shape!r} for {name}, whose full widths are {dense}")
    if not all(type(w) is int and 0 < w <= whole for w, whole in zip(shape, dense, strict=True)):
        raise ValueError(f"cfg has {shape!r} for {name}: widths must be integers from 1 to {dense}")
    if not isinstance(layer, nn.Conv2d):
        return layer
    if is_depthwise(layer) and shape[0] != shape[1]:
        raise ValueError(
            f"cfg has {shape} for {name}, which is depthwise: in and out must be equal"
        )
    if any(width % _groups(layer, shape) for width in shape):
        raise ValueError(
            f"cfg has {shape} for {name}: its {layer.groups} groups must divide both widths"
        )
    return layer


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether each filter reads one channel, with the same index."""
    return conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1


def _groups(conv: nn.Conv2d, shape: list[int]) -> int:
    return shape[0] if is_depthwise(conv) else conv.groups


def _set_widths(layer: Layer, shape: list[int]) -> None:
    sizes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), shape[-1:])
    if isinstance(layer, nn.Conv2d):
        layer.groups = _groups(layer, shape)
        layer.in_channels, layer.out_channels = shape
        sizes["weight"] = [shape[1], shape[0] // layer.groups, *layer.kernel_size]
    elif isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = shape
        sizes["weight"] = shape[::-1]
    elif isinstance(layer, BATCH_NORMS):
        layer.num_features = shape[0]
    else:
        layer.num_parameters = shape[0]
    for part, size in sizes.items():
        if (old := getattr(layer, part, None)) is not None:
            setattr(layer, part, _empty_like(old, size))
    layer.reset_parameters()


def _empty_like(old: torch.Tensor, size: list[int]) -> torch.Tensor:
    """An uninitialized parameter or buffer like ``old``, with another size."""
    new = old.new_empty(size)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
