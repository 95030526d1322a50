"""SGD and its learning rate schedule."""

import torch
from torch import nn


def make_optimizer(
    model: nn.Module, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD over all parameters that need a gradient, scaling factors included, as in the paper."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    fused = trainable[0].device.type in ("cpu", "cuda")
    optimizer = torch.optim.SGD(trainable, lr, momentum, weight_decay=weight_decay, fused=fused)
    if momentum:  # zeros, because the fused kernel does not define a first step that overflows
        for parameter in trainable:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@torch.no_grad()
def load_momentum(optimizer: torch.optim.Optimizer, saved: dict | None) -> bool:
    """Load the momentum of a saved optimizer, but not its settings, which come from the flags.

    Returns False, with nothing changed, if it does not fit the parameters.
    """
    if saved is None:
        return False
    parameters = optimizer.param_groups[0]["params"]
    try:
        # sorted; in files of the original suite the indices have gaps, because it counts masks too
        stored = [saved["state"][i]["momentum_buffer"] for i in sorted(saved["state"])]
        fits = [s.shape == p.shape for s, p in zip(stored, parameters, strict=True)]
    except (TypeError, KeyError, ValueError, AttributeError):
        return False
    if all(fits):
        for parameter, buffer in zip(parameters, stored, strict=True):
            own = torch.empty_like(parameter).copy_(buffer)  # in the layout of the parameter
            optimizer.state[parameter]["momentum_buffer"] = own
    return all(fits)


def learning_rate(epoch: int, epochs: int, lr: float) -> float:
    """``lr`` divided by 10 at int(epochs / 2) and again at int(3 epochs / 4)."""
    milestones = (int(epochs * 0.5), int(epochs * 0.75))
    return lr * 0.1 ** sum(epoch >= max(1, milestone) for milestone in milestones)
