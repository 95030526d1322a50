"""The L1 subgradient on the scaling factors, and the mask that keeps pruned channels pruned."""

import torch
from torch import nn


def batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Every BatchNorm2d of the model by its name, in the order of the forward pass."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)  # --sync-bn turns the one into the other
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


class L1Penalty:
    """Add the subgradient of s · Σ|γ| to the gradients: grad(γ) += s · sign(γ).

    γ are the weights of every BatchNorm2d of ``model`` (Network Slimming, eq. 1). Call it between
    backward and step, when the gradients are whole: unscaled, reduced and accumulated.

    >>> bn = nn.BatchNorm2d(2)
    >>> bn.weight.grad = torch.zeros(2)
    >>> L1Penalty(bn, s=0.5)()
    >>> bn.weight.grad
    tensor([0.5000, 0.5000])
    """

    def __init__(self, model: nn.Module, s: float):
        self.s = s
        self.gammas = [bn.weight for bn in batch_norms(model).values()]

    @torch.no_grad()
    def __call__(self) -> None:
        grads = [gamma.grad for gamma in self.gammas]
        torch._foreach_add_(grads, torch._foreach_sign(self.gammas), alpha=self.s)


class GradientMask:
    """Zero the gradients of γ and β of the channels that are pruned by γ = β = 0.

    The channels are found once, here. With zero gradient, weight decay of a zero and no momentum
    they stay at exactly zero; so the momentum that ``optimizer`` may already hold is cleared too.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None):
        self.parameters, self.keep = [], []
        for bn in batch_norms(model).values():
            keep = ((bn.weight != 0) | (bn.bias != 0)).to(bn.weight.dtype)
            self.parameters += [bn.weight, bn.bias]
            self.keep += [keep, keep]
        for parameter, keep in zip(self.parameters, self.keep, strict=True):
            momentum = optimizer and optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                momentum.mul_(keep)

    @torch.no_grad()
    def __call__(self) -> None:
        torch._foreach_mul_([p.grad for p in self.parameters], self.keep)


def updateBN(model: nn.Module, s: float = 1e-4) -> None:
    """One call of `L1Penalty`, under the name it has in the original scripts."""
    L1Penalty(model, s)()


def BN_grad_zero(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """One call of `GradientMask`, under the name it has in the original scripts."""
    GradientMask(model, optimizer)()
