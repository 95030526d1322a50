"""A gradient mask that keeps pruned weights zero."""

from collections.abc import Callable

import torch
from torch import nn

from slimming.errors import UserError
from slimming.training.penalties.factors import affine_norms, with_gradients

Keep = dict[torch.Tensor, torch.Tensor]  # parameter -> mask of its shape, 0 where it is pruned


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
    def on_gradients(self, batch: object = None) -> None:
        masks = self._masks()
        parameters, grads = with_gradients(masks)
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


def BN_grad_zero(model: nn.Module) -> None:
    """One call of `GradientMask`, with the name and signature of the original scripts: zero the
    gradients of γ and β of every channel with γ = 0."""
    GradientMask(model).on_gradients()
