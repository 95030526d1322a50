"""The L1 subgradient of the scaling factors, the penalty of the paper."""

import torch
from torch import nn

from slimming.errors import UserError
from slimming.training.penalties.factors import affine_norms, with_gradients


class L1Penalty:
    """Add the subgradient of s · Σ|γ| to the gradients: grad(γ) += s · sign(γ).

    γ are the trainable weights of every BatchNorm of ``model`` (Network Slimming, eq. 1); those
    without a gradient are skipped. Call `on_gradients` between backward and step, when gradients
    are final: unscaled, reduced and accumulated. As a callback of a trainer, it follows the network
    when that is replaced. UserError if the network has no such weights.

    >>> bn = nn.BatchNorm2d(2)
    >>> bn.weight.grad = torch.zeros(2)
    >>> L1Penalty(bn, s=0.5).on_gradients()
    >>> bn.weight.grad
    tensor([0.5000, 0.5000])
    """

    def __init__(self, model: nn.Module, s: float):
        self.s = s
        self.on_replace(model)
        if not any(norm.weight.requires_grad for norm in self.norms):
            raise UserError(
                "the network has no BatchNorm with trainable scaling factors: train it without "
                "the sparsity penalty"
            )

    def on_replace(self, model: nn.Module) -> None:
        self.norms = affine_norms(model)  # not their weights, which may be replaced, too

    @property
    def gammas(self) -> list[nn.Parameter]:
        """The scaling factors that it acts on."""
        return [norm.weight for norm in self.norms if norm.weight.requires_grad]

    @torch.no_grad()
    def on_gradients(self, batch: object = None) -> None:
        gammas, grads = with_gradients(norm.weight for norm in self.norms)
        if grads:
            torch._foreach_add_(grads, torch._foreach_sign(gammas), alpha=self.s)


def updateBN(model: nn.Module, s: float = 1e-4) -> None:
    """One call of `L1Penalty`, with the name and signature of the original scripts."""
    L1Penalty(model, s).on_gradients()


update_bn = updateBN  # the name in the suite of preact_res20
