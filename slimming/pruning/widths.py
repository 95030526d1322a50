"""Read and change the widths of layers: the numbers of channels that they read and write."""

import torch
from torch import nn

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # --sync-bn converts one to the other
LAYERS = (nn.Conv2d, nn.Linear, *BATCH_NORMS, nn.PReLU)  # the layers that can be sliced
BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm
Layer = nn.Conv2d | nn.Linear | BatchNorm | nn.PReLU


def widths(model: nn.Module) -> dict[str, list[int]]:
    """The widths of each layer with channels, by name: [in, out] of a Conv2d or Linear, [channels]
    of a BatchNorm2d or PReLU.

    >>> widths(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    {'0': [3, 8], '1': [8]}
    """
    layers = model.named_modules()
    return {name: layer_widths(layer) for name, layer in layers if isinstance(layer, LAYERS)}


def layer_of(model: nn.Module, name: str) -> Layer:
    """The layer called ``name``, which is one of the LAYERS."""
    layer = model.get_submodule(name)
    assert isinstance(layer, LAYERS), f"{name} is a {type(layer).__name__}"
    return layer


def layer_widths(layer: Layer) -> list[int]:
    """[in, out] of a Conv2d or Linear, [channels] of the other LAYERS."""
    if isinstance(layer, nn.Conv2d):
        return [layer.in_channels, layer.out_channels]
    if isinstance(layer, nn.Linear):
        return [layer.in_features, layer.out_features]
    return [layer.num_features if isinstance(layer, BATCH_NORMS) else layer.num_parameters]


def width(layer: Layer, side: str) -> int:
    """The number of channels that one of the LAYERS reads (side 'in') or writes (other sides)."""
    return layer_widths(layer)[0 if side == "in" else -1]


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether each filter reads one channel, with the same index."""
    return conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1


def set_widths(layer: Layer, shape: list[int]) -> None:
    """Give one of the LAYERS the widths ``shape`` (see `layer_widths`), in place.

    Its tensors become uninitialized, with the same device and dtype. A depthwise convolution gets
    as many groups as channels; any other grouped convolution keeps its groups. ValueError, with
    the layer unchanged, if it would have no channels or the groups do not divide them.
    """
    groups = _groups(layer, shape)
    sizes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), shape[-1:])
    if isinstance(layer, nn.Conv2d):
        layer.groups, (layer.in_channels, layer.out_channels) = groups, shape
        sizes["weight"] = [shape[1], shape[0] // groups, *layer.kernel_size]
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


def fit_to(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """Give each layer of a dense ``model`` the widths of its tensors in the state dict ``state``,
    in place, so that ``state`` can be loaded; return the model.

    ValueError, with the model unchanged, if a layer would be wider or have other dimensions.

    >>> slim = nn.Conv2d(3, 5, 3)
    >>> fit_to(nn.Conv2d(3, 8, 3), slim.state_dict())
    Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1))
    """
    shapes = {}
    for name, dense in widths(model).items():
        layer, prefix = layer_of(model, name), f"{name}." if name else ""
        tensor = state.get(f"{prefix}weight", state.get(f"{prefix}running_mean"))
        if tensor is None:
            continue
        shape = list(tensor.shape[:2])[::-1] if len(dense) == 2 else list(tensor.shape)
        if isinstance(layer, nn.Conv2d) and len(shape) == 2:
            shape[0] *= shape[1] if is_depthwise(layer) else layer.groups
        if len(shape) != len(dense) or any(a > b for a, b in zip(shape, dense, strict=True)):
            raise ValueError(f"{name} has widths {shape}, but the dense layer has {dense}")
        if shape != dense:
            shapes[layer] = shape
            _groups(layer, shape)
    for layer, shape in shapes.items():
        set_widths(layer, shape)
    return model


def _groups(layer: Layer, shape: list[int]) -> int:
    """The groups of a layer of this shape. ValueError if they do not divide its channels, or it
    has none."""
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.Conv2d) and is_depthwise(layer):
        groups = shape[-1]
    if min(shape) < 1 or any(size % groups for size in shape):
        raise ValueError(f"a layer with {groups} groups cannot have widths {shape}")
    return groups


def _empty_like(old: torch.Tensor, size: list[int]) -> torch.Tensor:
    """An uninitialized parameter or buffer like ``old``, with another size."""
    new = old.new_empty(size)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
