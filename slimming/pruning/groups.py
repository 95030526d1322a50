"""Which channels of a network are coupled: as its ``wiring()`` declares, else as a trace finds."""

from collections.abc import Iterable

import torch
from torch import nn

from slimming.errors import UserError
from slimming.pruning import tracing
from slimming.pruning.coupling import Group, Member, inside, is_wired
from slimming.pruning.scaling import present_channels, selections


def groups(model: nn.Module, images: torch.Tensor, ignore: Iterable[str] = ()) -> list[Group]:
    """The channels of ``model`` that can be removed, as `Group`s in the order of the forward pass.

    A network that declares with ``wiring()`` which layer reads and writes which BN is taken at its
    word; of any other one image (of ``images``, (N, 3, H, W)) is traced. Left out are the
    classifier, and every group with a layer called in ``ignore`` (its name or that of a module
    around it) among those that write it. UserError if a layer cannot be sliced exactly.
    """
    if not isinstance(images, torch.Tensor):
        raise UserError("images must be one tensor (N, 3, H, W), all that the network reads")
    check_names(model, ignore)
    if is_wired(model):
        return declared(model, ignore)
    return tracing.traced(model, images, ignore)


def declared(model: nn.Module, ignore: Iterable[str] = ()) -> list[Group]:
    """The groups of a network with ``wiring()``, one for each BN and under its name."""
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
    """UserError if no module of ``model`` is called as one of ``ignore``."""
    names = [name for name, _ in model.named_modules()]
    missing = [word for word in ignore if not any(inside(name, word) for name in names)]
    if missing:
        raise UserError(f"the network has no layer called {', '.join(missing)}")


def _writing(name: str, writers: list[str], size: int) -> list[Member]:
    """The BN of a group and the layers that write it; where there are none it keeps a mask."""
    every = torch.arange(size)
    if not writers:
        return [Member(name, "mask", every, every)]
    return [Member(layer, "out", every, every) for layer in (*writers, name)]
