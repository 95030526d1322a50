"""The sparsity of the scaling factors, which tells how much can be pruned without harm."""

import torch
from torch import nn

from slimming.channels.scaling import alive_channels, scaling_factors

NEAR_ZERO = 1e-2


def alive_factors(model: nn.Module) -> torch.Tensor:
    """|γ| of all alive channels, as one vector on the CPU."""
    factors, alive = scaling_factors(model), alive_channels(model)
    return torch.cat([torch.zeros(0), *(factors[name][alive[name]] for name in factors)])


def near_zero(model: nn.Module) -> float:
    """The fraction of channels with |γ| below NEAR_ZERO."""
    factors = alive_factors(model)
    return float((factors < NEAR_ZERO).sum()) / max(1, len(factors))
