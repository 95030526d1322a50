"""Penalties on scaling factors, a file each, and the mask that keeps pruned weights zero.

- `L1Penalty`, `updateBN`: s · Σ|γ|, the penalty of the paper, on every BatchNorm
- `PENALTIES`: those on `Factors`, by name: `on_gradients()` before, `after_step(optimizer)` after a
  step, or one of them
- `GradientMask`, `BN_grad_zero`: pruned weights stay zero
"""

from collections.abc import Callable
from typing import Any

from slimming.training.penalties.factors import Factors, affine_norms
from slimming.training.penalties.group import GroupLasso
from slimming.training.penalties.l1 import L1Penalty, update_bn, updateBN
from slimming.training.penalties.masks import BN_grad_zero, GradientMask
from slimming.training.penalties.polar import Polarization
from slimming.training.penalties.prox import Proximal

PENALTIES: dict[str, Callable[[Factors, float], Any]] = {
    "l1": GroupLasso,  # where each γ is a unit of its own
    "group": GroupLasso,
    "prox": Proximal,
    "polar": Polarization,
}

__all__ = [
    "PENALTIES",
    "BN_grad_zero",
    "Factors",
    "GradientMask",
    "GroupLasso",
    "L1Penalty",
    "Polarization",
    "Proximal",
    "affine_norms",
    "updateBN",
    "update_bn",
]
