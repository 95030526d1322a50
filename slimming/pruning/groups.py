"""Find the coupled channels of a network: declared by its ``wiring()``, or else traced."""

from collections.abc import Iterable

import torch
from torch import nn

from slimming.errors import UserError
from slimming.pruning import tracing
from slimming.pruning.coupling import Group, Member, inside, is_wired
from slimming.pruning.scaling import present_channels, selections


def groups(model: nn.Module, images: torch.Tensor, ignore: Iterable[str] = ()) -> list[Group]:
    """The channels of ``model`` that can be removed, as `Group`s in the order of the forward pass.

    If the network has a ``wiring()``, which declares the BNs that each layer reads and writes, that
    is used; any other network is traced with one of ``images`` (N, 3, H, W). The classifier is
    excluded, and so is every group that is written by a layer in ``ignore`` (names of layers, or of
    modules that contain them). UserError if a layer cannot be sliced exactly.
    """
    if not isinstance(images, torch.Tensor):
        raise UserError("images must be one tensor (N, 3, H, W), the only input of the network")
    check_names(model, ignore)
    if is_wired(model):
        return declared(model, ignore)
    return tracing.traced(model, images, ignore)


def declared(model: nn.Module, ignore: Iterable[str] = ()) -> list[Group]:
    """The groups of a network with ``wiring()``: one for each BN, with its name."""
    assert is_wired(model), "the network has no wiring()"
    wires, whole = model.wiring(), selections(model)
    coupled = []
    for name, present in present_channels(model).items():
        writers = [wire.layer for wire in wires if wire.writes == name]
        members = _writing(name, writers, len(present))
        kept = present.nonzero().flatten()
        readers = [wire.layer for wire in wires if wire.reads == name]
        members += [Member(layer, "in", torch.arange(len(kept)), kept) for layer in readers]
        named = [name, *writers, *([whole[name]] if name in whole else [])]
        if not any(inside(layer, word) for layer in named for word in ignore):
            filters = present.long() * max(1, len(writers))
            coupled.append(Group(name, members, filters, present))
    return coupled


def check_names(model: nn.Module, ignore: Iterable[str]) -> None:
    """UserError if one of ``ignore`` is not the name of a module of ``model``."""
    names = [name for name, _ in model.named_modules()]
    missing = [word for word in ignore if not any(inside(name, word) for name in names)]
    if missing:
        raise UserError(f"the network has no layer called {', '.join(missing)}")


def _writing(name: str, writers: list[str], size: int) -> list[Member]:
    """The BN of a group and the layers that write it; without any such layer, the BN is masked."""
    every = torch.arange(size)
    if not writers:
        return [Member(name, "mask", every, every)]
    return [Member(layer, "out", every, every) for layer in (*writers, name)]
