"""The arguments of a network, and the tensors in what it returns."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from slimming.errors import UserError

# one tensor, a tuple of positional arguments, or a dict of keyword arguments
Inputs = torch.Tensor | tuple | list | dict[str, Any]

LONGEST = {4: 128, 5: 64}  # positions along a side, by the dimensions of a tensor
STEP = 32  # what networks divide sizes by


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What ``model`` returns for ``inputs``."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def network(value: object) -> nn.Module:
    """``value``, a network, or the one in what `slimming.prune` returned. UserError for others."""
    inner = value if isinstance(value, nn.Module) else getattr(value, "model", None)
    if not isinstance(inner, nn.Module):
        raise UserError(f"pass a network (nn.Module), not: {type(value).__name__}")
    return inner


@contextlib.contextmanager
def alone(gradients: bool = False) -> Iterator[None]:
    """Whatever surrounds the caller: with ``gradients`` or without, not in inference mode, and
    without autocast."""
    cpu, cuda = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda"))
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), cpu, cuda:
        yield


@contextlib.contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Afterwards each module is in the mode, training or not, that it was in: they may be mixed."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in any tree of lists, dicts, tuples, dataclasses and other objects."""
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not callable(leaf):  # a dataclass, a box of results
            found += [t for part in vars(leaf).values() for t in tensors(part)]
    return found


def mapped(inputs: Inputs, function: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """``inputs`` with each tensor replaced."""
    return tree_map(lambda t: function(t) if isinstance(t, torch.Tensor) else t, inputs)


def count(inputs: Inputs) -> int:
    """The number of samples: the first dimension of the first tensor. UserError without one."""
    found = [t for t in tensors(inputs) if t.dim()]
    if not found:
        raise UserError("inputs must have a tensor: one, a tuple of arguments, or a dict of them")
    return len(found[0])


def first(inputs: Inputs, samples: int) -> Inputs:
    """The first samples only, of each tensor that has as many as the first one."""
    return part(inputs, 0, samples)


def part(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The samples from ``start`` to ``stop`` only, of each tensor that has as many as the first."""
    whole = count(inputs)
    return mapped(inputs, lambda t: t[start:stop] if t.dim() and len(t) == whole else t)


def split(inputs: Inputs, size: int) -> list[Inputs]:
    """``inputs`` in parts of ``size`` samples, the last maybe smaller."""
    return [part(inputs, start, start + size) for start in range(0, count(inputs), size)]


def like(inputs: Inputs, device: torch.device | str, dtype: torch.dtype | None = None) -> Inputs:
    """``inputs`` on a device, those of floats in a dtype."""

    def there(t: torch.Tensor) -> torch.Tensor:
        t = t.clone() if t.is_inference() else t  # which are not written outside of that mode
        return t.to(device, dtype if t.is_floating_point() else None)

    with alone():
        return mapped(inputs, there)


def smaller(inputs: Inputs) -> Inputs | None:
    """Images and volumes (N, C, ...) of the size `LONGEST`, if these are larger."""
    maps = [t for t in tensors(inputs) if t.dim() in LONGEST and t.is_floating_point()]
    scale = min((LONGEST[t.dim()] / max(t.shape[2:]) for t in maps if t.numel()), default=1.0)
    if scale >= 1:
        return None

    def shrunk(t: torch.Tensor) -> torch.Tensor:
        if t.dim() not in LONGEST or not t.is_floating_point():
            return t
        sizes = (min(s, max(STEP, round(s * scale / STEP) * STEP)) for s in t.shape[2:])
        for dim, size in enumerate(sizes, 2):
            t = t.narrow(dim, 0, size)
        return t

    return mapped(inputs, shrunk)


def only_logits(outputs: object) -> torch.Tensor:
    """``outputs`` of a network, if they are one tensor; UserError otherwise."""
    if not isinstance(outputs, torch.Tensor):
        raise UserError(
            f"the network returns a {type(outputs).__name__}, not a tensor of logits: wrap it in a "
            "module that returns only the logits"
        )
    return outputs
