"""Polarization: scaling factors go to zero or away from it."""

import torch

from slimming.training.penalties.factors import Factors

T = 1.4  # of the L1 norm in `Polarization`


class Polarization:
    """The subgradient of s · (t Σ|γ| - Σ|γ - μ|), with μ the mean of all γ (Zhuang et al., NeurIPS
    2020, eq. 2); γ are kept in [0, 1]."""

    def __init__(self, factors: Factors, s: float, t: float = T):
        self.factors, self.s, self.t = factors, s, t

    @torch.no_grad()
    def on_gradients(self, batch: object = None, *, scale: float = 1.0) -> None:
        factors = self.factors
        flat = factors.flat()
        acts = factors.acts
        mean = (flat * acts).sum() / acts.sum()  # without a wait for the device
        signs = (flat - mean).sign() * acts
        direction = (self.t * flat.sign() - signs + signs.sum() / acts.sum()) * acts
        factors.add_to_gradients(direction, self.s * scale)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.factors.write(self.factors.flat().clamp_(0, 1))
