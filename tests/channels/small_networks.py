"""What the tests of the engine share: small networks in a few lines, and their proof."""

import torch
from torch import nn

from slimming.channels.groups import Channels, Group, traced
from slimming.channels.inputs import Inputs
from slimming.slicing.proof import compared, outputs
from slimming.slicing.slim import kept_channels, masked, sliced


class Net(nn.Module):
    """Layers and parameters by their names, and a function of them that runs them."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def pooled(x):
    """(N, C, ...) -> (N, C)."""
    return x.flatten(2).mean(2)


def randomized(model: nn.Module) -> nn.Module:
    """Weights, biases and statistics that are neither 0 nor 1 nor equal: a wrong slice shows."""
    generator = torch.Generator().manual_seed(0)
    selections = [m.indexes for m in model.modules() if hasattr(m, "indexes")]
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_floating_point() or any(tensor is t for t in selections):
            continue
        fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 4
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("var"):
            buffer.abs_().add_(0.5)
    return model.eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def sizes(found: Channels) -> dict[str, int]:
    """The number of units of each group, by the name of its first layer."""
    return {group.name: group.size for group in found.groups}


def choice(groups: list[Group], seed: int = 0) -> dict[str, torch.Tensor]:
    """About half of the units of each group, at least one of each of its layers; with an odd seed
    more of the last units."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in groups:
        share = torch.linspace(0.1, 0.9, group.size) if seed % 2 else 0.5
        mask = (torch.rand(group.size, generator=generator) < share) & group.alive
        for member in group.members:
            if not mask[member.units].any():
                mask[member.units[0]] = True
        keep[group.name] = mask
    return keep


def prove(model: nn.Module, groups: list[Group], inputs: Inputs, seed: int = 0) -> None:
    """The slim network equals the masked one, its outputs depend on the inputs, and what was
    removed was of use."""
    keep = choice(groups, seed)
    kept = kept_channels(groups, keep)
    slim, reference = sliced(model, kept), masked(model, kept)
    assert compared(slim, reference, inputs) <= 1e-5
    assert any(t.is_floating_point() and t.std() > 1e-6 for t in outputs(slim, inputs))
    if any(not mask.all() for mask in keep.values()):
        assert compared(reference, model, inputs) > 1e-5
        assert count(slim) < count(model)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def faults(model: nn.Module, inputs: Inputs) -> list[str]:
    """The operations whose rules raised an exception."""
    return traced(model, inputs)[0].faults
