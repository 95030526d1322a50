"""A proximal step: scaling factors that become exactly zero."""

import torch

from slimming.errors import UserError
from slimming.training.penalties.factors import Factors


class Proximal:
    """After each step γ ← sign(γ) · max(|γ| - η s / (1 - m), 0), the proximal operator of s · Σ|γ|
    (Ye et al., ICLR 2018, 1802.00124), with η the learning rate of γ and m its momentum.

    The subgradient of `L1Penalty` enters the momentum, which adds up to 1 / (1 - m) of it: the
    division gives ``s`` the same meaning. γ that scale the same channels shrink as one group, by
    the operator of the group lasso. The momentum of what is zero is cleared. The scale of the loss
    and clipping do not matter.
    """

    def __init__(self, factors: Factors, s: float):
        self.factors, self.s = factors, s

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Shrink γ; ``optimizer`` has made the step. UserError without one."""
        if optimizer is None:
            raise UserError(
                "the penalty 'prox' needs the optimizer: after_step(optimizer), or attach"
            )
        factors = self.factors
        flat = factors.flat()
        rates = _rates(optimizer)
        if not any(id(gamma) in rates for gamma in factors.gammas):
            raise UserError("the optimizer trains no scaling factor of this network")
        own = [rates.get(id(gamma), 0.0) for gamma in factors.gammas]
        step = torch.cat(
            [flat.new_full((len(g),), r) for g, r in zip(factors.gammas, own, strict=True)]
        )
        shrink = self.s * step * factors.weights[factors.units]
        norms = factors.norms_of_units(flat)
        left = (norms - shrink).clamp_min_(0)
        alone = factors.sizes[factors.units] == 1
        tiny = torch.finfo(torch.float32).tiny
        small = torch.where(alone, flat.sign() * left, flat * (left / norms.clamp_min(tiny)))
        factors.write(small)
        for gamma, acts in zip(factors.gammas, factors.split(factors.acts), strict=True):
            for value in optimizer.state.get(gamma, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == gamma.shape:
                    value.masked_fill_((gamma == 0) & acts, 0)


def _rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """η / (1 - m) of each parameter."""
    return {
        id(parameter): float(group["lr"]) / (1 - float(group.get("momentum", 0.0)))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
