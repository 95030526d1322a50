"""The L1 subgradient of the scaling factors, and a gradient mask that keeps pruned weights zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from slimming.errors import UserError

if TYPE_CHECKING:  # so that `import slimming` does not import all of slimming.data
    from slimming.training.callbacks import Batch

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
Keep = dict[torch.Tensor, torch.Tensor]  # parameter -> mask of its shape, 0 where it is pruned


def affine_norms(model: nn.Module) -> list[BatchNorm]:
    """Every BatchNorm of ``model`` with a scaling factor, for inputs of any dimension."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.affine]


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
    def on_gradients(self, batch: Batch | None = None) -> None:
        gammas, grads = _with_gradients(norm.weight for norm in self.norms)
        if grads:
            torch._foreach_add_(grads, torch._foreach_sign(gammas), alpha=self.s)


class GradientMask:
    """Zero the gradients of pruned weights, so that they stay exactly zero: the weight decay of
    zero is zero, and their momentum in ``optimizer`` is cleared.

    By default, γ and β of each channel with γ = 0, as in the original scripts (a β that is not zero
    only decays). With ``keep``, the parameters where their mask is 0: the masks by parameter, or a
    function of the network that returns them, which is called again when a trainer replaces its
    network.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        keep: Keep | Callable[[nn.Module], Keep] | None = None,
    ):
        self.find = keep if callable(keep) else None
        self.fixed = keep if isinstance(keep, dict) else None
        self._look_at(model)
        if optimizer is not None:
            self._clear_momentum(optimizer)

    def on_replace(self, model: nn.Module) -> None:
        if self.fixed and not self.find:
            raise UserError(
                "GradientMask has the masks of a network that was replaced: pass a function of "
                "the network as keep, which returns its masks"
            )
        self._look_at(model)

    @torch.no_grad()
    def on_gradients(self, batch: Batch | None = None) -> None:
        masks = self._masks()
        parameters, grads = _with_gradients(masks)
        if grads:
            torch._foreach_mul_(grads, [masks[parameter] for parameter in parameters])

    def summary(self) -> str:
        """What is held, in words; empty if nothing is."""
        if self.fixed is None:
            channels = sum(int((norm.weight == 0).sum()) for norm in self.norms)
            return f"{channels:,} channels with γ = 0 are not trained" if channels else ""
        weights = sum(int((mask == 0).sum()) for mask in self.fixed.values())
        return f"{weights:,} pruned weights stay zero" if weights else ""

    def _look_at(self, model: nn.Module) -> None:
        self.norms = affine_norms(model)
        if self.find:
            self.fixed = self.find(model)

    def _masks(self) -> Keep:
        """The masks of this step. Those of channels are functions of γ, so that a resumed run has
        the same ones."""
        if self.fixed is not None:
            return self.fixed
        masks = {norm: (norm.weight != 0).to(norm.weight.dtype) for norm in self.norms}
        return {p: mask for norm, mask in masks.items() for p in (norm.weight, norm.bias)}

    @torch.no_grad()
    def _clear_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, mask in self._masks().items():
            momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:  # a β that decays keeps its momentum
                momentum.mul_(mask if self.fixed is not None else (mask != 0) | (parameter != 0))


def _with_gradients(
    parameters: Iterable[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The trainable ``parameters`` that have a gradient, and their gradients."""
    pairs = [(p, p.grad) for p in parameters if p.requires_grad and p.grad is not None]
    return [parameter for parameter, _ in pairs], [grad for _, grad in pairs]


def updateBN(model: nn.Module, s: float = 1e-4) -> None:
    """One call of `L1Penalty`, with the name and signature of the original scripts."""
    L1Penalty(model, s).on_gradients()


update_bn = updateBN  # the name in the suite of preact_res20


def BN_grad_zero(model: nn.Module) -> None:
    """One call of `GradientMask`, with the name and signature of the original scripts: zero the
    gradients of γ and β of every channel with γ = 0."""
    GradientMask(model).on_gradients()
