"""Group lasso: the scaling factors of coupled channels shrink together."""

import torch

from slimming.training.penalties.factors import Factors


class GroupLasso:
    """The subgradient of s · Σ_u ‖γ_u‖₂ / √k over the units u of coupled channels, with k scaling
    factors each (Yuan and Lin, 2006): s · Σ|γ| where one γ scales a unit, of a unit that several
    scale, as in a residual sum, one with the strength of one.
    """

    def __init__(self, factors: Factors, s: float):
        self.factors, self.s = factors, s

    @torch.no_grad()
    def on_gradients(self, batch: object = None, *, scale: float = 1.0) -> None:
        factors = self.factors
        flat = factors.flat()
        norms = factors.norms_of_units(flat).clamp_min_(torch.finfo(torch.float32).tiny)
        alone = factors.sizes[factors.units] == 1  # exactly ±1: the quotient is, up to rounding
        direction = flat * (factors.weights[factors.units] / norms)
        direction = torch.where(alone & factors.acts, flat.sign(), direction)
        factors.add_to_gradients(direction, self.s * scale)
