"""Read and change the widths of layers: the numbers of channels that they read and write."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slimming.channels.kinds import Convolution, Kind, is_depthwise, kind_of, put

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def widths(model: nn.Module) -> dict[str, list[int]]:
    """The widths of each layer with channels, by name: [in, out] of a convolution or linear layer,
    [channels] of a normalisation, a PReLU or an embedding.

    >>> widths(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    {'0': [3, 8], '1': [8]}
    """
    layers = model.named_modules()
    return {name: layer_widths(layer) for name, layer in layers if has_channels(layer)}


def has_channels(layer: nn.Module) -> bool:
    """Whether a layer is of one of the `KINDS`, with a slope of its own for each channel."""
    return kind_of(layer) is not None and getattr(layer, "num_parameters", 2) > 1


def layer_of(model: nn.Module, name: str) -> Any:
    """The layer called ``name``, which is of one of the `KINDS`."""
    layer = model.get_submodule(name)
    assert kind_of(layer) is not None, f"{name} is a {type(layer).__name__}"
    return layer


def layer_widths(layer: nn.Module) -> list[int]:
    """[in, out] of a convolution or linear layer, [channels] of another layer of the `KINDS`."""
    if isinstance(layer, Convolution):
        return [layer.in_channels, layer.out_channels]
    if isinstance(layer, nn.Linear):
        return [layer.in_features, layer.out_features]
    kind = kind_of(layer)
    assert kind is not None, f"a {type(layer).__name__} has no channels"
    for part, dim in kind.out.items():
        if (tensor := getattr(layer, part, None)) is not None:
            return [tensor.shape[dim]]
    (held, *_) = kind.attributes(layer, [0])  # it has no tensors, as a BN without γ and statistics
    return [int(getattr(layer, held))]


def width(layer: nn.Module, side: str) -> int:
    """The number of channels that a layer reads (side 'in') or writes (other sides)."""
    return layer_widths(layer)[0 if side == "in" else -1]


def set_widths(layer: nn.Module, shape: Sequence[int]) -> None:
    """Give a layer the widths ``shape`` (see `layer_widths`), in place.

    Its tensors become uninitialized, with the same device and dtype. A depthwise convolution gets
    as many groups as channels; any other grouped convolution keeps its groups. ValueError, with
    the layer unchanged, if it would have no channels or the groups do not divide them.
    """
    kind = kind_of(layer)
    assert kind is not None
    groups = _groups(layer, shape)
    sizes: dict[str, list[int]] = {}
    for dims, count in ((kind.out, shape[-1]), (kind.into, shape[0])):
        for part, dim in dims.items():
            if (old := getattr(layer, part, None)) is not None:
                size = sizes.setdefault(part, list(old.shape))
                size[dim] = count // groups if part == "weight" and dim == 1 else count
    tensors = {part: _empty_like(getattr(layer, part), size) for part, size in sizes.items()}
    for part, tensor in tensors.items():
        put(layer, part, tensor)
    if not tensors:
        set_attributes(layer, kind, shape)


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
    fits = [(_checked(name, layers.get(name), shape), shape) for name, shape in cfg.items()]
    for layer, shape in fits:
        if shape != layer_widths(layer):
            set_widths(layer, shape)
        if reset := getattr(layer, "reset_parameters", None):
            reset()
    return model


def _checked(name: str, layer: nn.Module | None, shape: list[int]) -> nn.Module:
    """``layer``, if it can have the widths ``shape``; else ValueError."""
    if layer is None or not has_channels(layer):
        raise ValueError(f"cfg has {name!r}, which is not a layer with channels in this network")
    dense = layer_widths(layer)
    if not isinstance(shape, list) or len(shape) != len(dense):
        raise ValueError(f"cfg has {shape!r} for {name}, whose full widths are {dense}")
    if not all(type(w) is int and 0 < w <= whole for w, whole in zip(shape, dense, strict=True)):
        raise ValueError(f"cfg has {shape!r} for {name}: widths must be integers from 1 to {dense}")
    if is_depthwise(layer) and shape[1] * dense[0] != shape[0] * dense[1]:
        raise ValueError(
            f"cfg has {shape} for {name}, which is depthwise: in and out must be equal"
            if dense[0] == dense[1]
            else f"cfg has {shape} for {name}, which is depthwise: they must be in the proportion "
            f"of {dense}"
        )
    try:
        _groups(layer, shape)
    except ValueError as error:
        raise ValueError(
            f"cfg has {shape} for {name}: its {getattr(layer, 'groups', 1)} groups must divide "
            "both widths"
        ) from error
    return layer


def fit_to(model: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Give each parameter and buffer of a dense ``model`` the shape of its tensor in the state dict
    ``state``, in place, so that ``state`` can be loaded; return the model.

    ValueError, with the model unchanged, if a tensor would be larger or have other dimensions.

    >>> slim = nn.Conv2d(3, 5, 3)
    >>> fit_to(nn.Conv2d(3, 8, 3), slim.state_dict())
    Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1))
    """
    own: dict[str, torch.Tensor] = {**dict(model.named_parameters(remove_duplicate=False))}
    own.update(model.named_buffers(remove_duplicate=False))
    shapes = {}
    for name, dense in own.items():
        if name not in state or state[name].shape == dense.shape:
            continue
        shape = list(state[name].shape)
        owner, _, part = name.rpartition(".")
        kernel = isinstance(model.get_submodule(owner), Convolution) and part == "weight"
        if (
            len(shape) != dense.dim()
            or any(a > b or a < 1 for a, b in zip(shape, dense.shape, strict=True))
            or (kernel and shape[2:] != list(dense.shape[2:]))
        ):
            raise ValueError(
                f"{owner or name} has widths {shape}, but the dense layer has {list(dense.shape)}"
            )
        shapes[name] = shape
    made: dict[int, torch.Tensor] = {}
    for name, shape in shapes.items():
        tensor = made.setdefault(id(own[name]), _empty_like(own[name], shape))
        owner, _, part = name.rpartition(".")
        put(model.get_submodule(owner), part, tensor)
    return model


def set_attributes(layer: nn.Module, kind: Kind, shape: Sequence[int]) -> None:
    """Set the attributes of a layer that has no tensors."""
    for attribute, value in kind.attributes(layer, shape).items():
        setattr(layer, attribute, value)


def _groups(layer: nn.Module, shape: Sequence[int]) -> int:
    """The groups of a layer of this shape. ValueError if they do not divide its channels, or it
    has none."""
    groups = layer.groups if isinstance(layer, Convolution) else 1
    if is_depthwise(layer):
        groups = shape[0]
    if min(shape) < 1 or any(size % groups for size in shape):
        raise ValueError(f"a layer with {groups} groups cannot have widths {list(shape)}")
    return 1 if is_depthwise(layer) else groups


def _empty_like(old: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """An uninitialized parameter or buffer like ``old``, with another size."""
    new = old.new_empty(list(size))
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
