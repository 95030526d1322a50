"""The scaling factors that a penalty acts on."""

from collections.abc import Iterable

import torch
from torch import nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def affine_norms(model: nn.Module) -> list[BatchNorm]:
    """Every BatchNorm of ``model`` with a scaling factor, for inputs of any dimension."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.affine]


def with_gradients(
    parameters: Iterable[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The trainable ``parameters`` that have a gradient, and their gradients."""
    pairs = [(p, p.grad) for p in parameters if p.requires_grad and p.grad is not None]
    return [parameter for parameter, _ in pairs], [grad for _, grad in pairs]


class Factors:
    """The scaling factors γ of ``norms`` as one vector, and the units that they scale.

    ``units`` (number of γ,) int: equal numbers where γ scale the same channels, 0 where γ are left
    alone; by default each γ is a unit of its own. ``sizes``: the number k of γ of each unit, and
    ``weights`` 1 / √k, with which a penalty on a unit is as strong as that on a single γ.
    """

    def __init__(self, norms: Iterable[BatchNorm], units: torch.Tensor | None = None):
        self.norms = list(norms)
        count = sum(len(norm.weight) for norm in self.norms)
        self.units = torch.arange(1, count + 1) if units is None else units
        self.sizes = torch.bincount(self.units, minlength=1)
        self.weights = self.sizes.clamp(min=1).rsqrt()
        self.weights[0] = 0

    @property
    def gammas(self) -> list[nn.Parameter]:
        """The scaling factors of each layer, as they are now."""
        return [norm.weight for norm in self.norms]

    @property
    def acts(self) -> torch.Tensor:
        """Which γ a penalty acts on."""
        return self.units > 0

    def flat(self) -> torch.Tensor:
        """γ of all layers (number of γ,) fp32."""
        flat = torch.cat([gamma.detach().float() for gamma in self.gammas])
        if self.units.device != flat.device:
            for name in ("units", "sizes", "weights"):
                setattr(self, name, getattr(self, name).to(flat.device))
        return flat

    def norms_of_units(self, flat: torch.Tensor) -> torch.Tensor:
        """‖γ_u‖₂ of the unit of each γ."""
        squares = torch.zeros_like(self.weights).index_add_(0, self.units, flat.square())
        return squares.sqrt_()[self.units]

    def split(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A vector like `flat` by layer."""
        return flat.split([len(gamma) for gamma in self.gammas])

    def add_to_gradients(self, direction: torch.Tensor, s: float) -> None:
        """grad(γ) += ``s`` · ``direction``, for γ that are trained."""
        pairs = [
            (gamma.grad, part.to(gamma.grad.dtype))
            for gamma, part in zip(self.gammas, self.split(direction), strict=True)
            if gamma.requires_grad and gamma.grad is not None
        ]
        if pairs:
            torch._foreach_add_([grad for grad, _ in pairs], [part for _, part in pairs], alpha=s)

    def write(self, flat: torch.Tensor) -> None:
        """γ = ``flat``, where γ are trained and a penalty acts."""
        acts = self.split(self.acts)
        for gamma, part, own in zip(self.gammas, self.split(flat), acts, strict=True):
            if gamma.requires_grad:
                gamma.copy_(torch.where(own, part.to(gamma.dtype), gamma))
