"""The L1 subgradient of the scaling factors, and a gradient mask that keeps pruned weights zero."""

import torch
from torch import nn

from slimming.errors import UserError
from slimming.pruning.scaling import batch_norms
from slimming.training.callbacks import Batch


class L1Penalty:
    """Add the subgradient of s · Σ|γ| to the gradients: grad(γ) += s · sign(γ).

    γ are the trainable weights of every BatchNorm2d of ``model`` (Network Slimming, eq. 1); those
    without a gradient are skipped. A training callback, between backward and step, when the
    gradients are final: unscaled, reduced and accumulated.

    >>> bn = nn.BatchNorm2d(2)
    >>> bn.weight.grad = torch.zeros(2)
    >>> L1Penalty(bn, s=0.5).on_gradients()
    >>> bn.weight.grad
    tensor([0.5000, 0.5000])
    """

    def __init__(self, model: nn.Module, s: float):
        self.s = s
        weights = [bn.weight for bn in batch_norms(model).values() if bn.affine]
        self.gammas: list[torch.Tensor] = [weight for weight in weights if weight.requires_grad]
        if not self.gammas:
            raise UserError("the network has no BatchNorm, so -sr has no scaling factors: omit it")

    @torch.no_grad()
    def on_gradients(self, batch: Batch | None = None) -> None:
        gammas = [gamma for gamma in self.gammas if gamma.grad is not None]
        grads = [gamma.grad for gamma in self.gammas if gamma.grad is not None]
        if grads:
            torch._foreach_add_(grads, torch._foreach_sign(gammas), alpha=self.s)


class GradientMask:
    """Zero the gradients of pruned weights: γ and β of the channels with γ = β = 0, or the
    parameters in ``keep`` where their mask is 0.

    The pruned weights are determined once, in the constructor. Without gradient, momentum and
    weight decay (that of zero is zero) they stay exactly zero, so their momentum in ``optimizer``
    is cleared too.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        keep: dict[torch.Tensor, torch.Tensor] | None = None,
    ):
        keep = _live_channels(model) if keep is None else keep
        self.parameters, self.keep = list(keep), list(keep.values())
        for parameter, mask in zip(self.parameters, self.keep, strict=True):
            state = optimizer.state[parameter] if optimizer else {}
            if (momentum := state.get("momentum_buffer")) is not None:
                momentum.mul_(mask)

    @torch.no_grad()
    def on_gradients(self, batch: Batch | None = None) -> None:
        if self.keep:
            grads = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_mul_(grads, self.keep)


def _live_channels(model: nn.Module) -> dict[torch.Tensor, torch.Tensor]:
    keep: dict[torch.Tensor, torch.Tensor] = {}
    for bn in batch_norms(model).values():
        keep[bn.weight] = keep[bn.bias] = ((bn.weight != 0) | (bn.bias != 0)).to(bn.weight.dtype)
    return keep


def updateBN(model: nn.Module, s: float = 1e-4) -> None:
    """One call of `L1Penalty`, with the name and signature of the original scripts."""
    L1Penalty(model, s).on_gradients()


update_bn = updateBN  # the name in the suite of preact_res20


@torch.no_grad()
def BN_grad_zero(model: nn.Module) -> None:
    """Zero the gradients of γ and β of every channel whose γ is exactly zero, as the original
    scripts do in each step. `GradientMask` determines such channels once, before training."""
    for bn in batch_norms(model).values():
        for parameter in (bn.weight, bn.bias):
            if parameter is not None and parameter.grad is not None:
                parameter.grad.mul_(bn.weight != 0)
