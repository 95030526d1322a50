"""Ridge regression from sums over samples: no sample is stored."""

from collections.abc import Sequence

import torch

STRENGTH = 1e-3  # of the ridge, relative to the mean square of the inputs, if none is chosen


class Gram:
    """Sums over samples x (G, n, F) of G independent regressions, in fp64."""

    def __init__(self, groups: int, features: int, device: torch.device) -> None:
        self.count = 0
        self.x = torch.zeros(groups, 1, features, dtype=torch.double, device=device)
        self.xx = torch.zeros(groups, features, features, dtype=torch.double, device=device)

    def add_inputs(self, x: torch.Tensor) -> None:
        """Count n more samples."""
        self.count += x.shape[1]
        self.x += x.sum(1, keepdim=True, dtype=torch.double)
        self.xx += x.mT @ x

    def covariance(self) -> torch.Tensor:
        """Cov(x, x) (G, F, F)."""
        mean = self.x / self.count
        return self.xx / self.count - mean.mT @ mean

    def penalty(self, strength: float) -> torch.Tensor:
        """λ (G, 1): ``strength`` times the mean square of the features."""
        squares = self.xx.diagonal(dim1=1, dim2=2) / self.count
        return strength * squares.mean(1, keepdim=True)


class Moments(Gram):
    """Sums over samples x (G, n, F) and r (G, n, O), in fp64."""

    def __init__(self, groups: int, features: int, outputs: int, device: torch.device) -> None:
        super().__init__(groups, features, device)
        self.r = torch.zeros(groups, 1, outputs, dtype=torch.double, device=device)
        self.xr = torch.zeros(groups, features, outputs, dtype=torch.double, device=device)
        self.rr = torch.zeros((), dtype=torch.double, device=device)

    def add(self, x: torch.Tensor, r: torch.Tensor) -> None:
        """Count n more samples."""
        self.add_inputs(x)
        self.r += r.sum(1, keepdim=True, dtype=torch.double)
        self.xr += x.mT @ r
        self.rr += r.square().sum(dtype=torch.double)

    def __iadd__(self, other: "Moments") -> "Moments":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def cross(self) -> torch.Tensor:
        """Cov(x, r) (G, F, O)."""
        return self.xr / self.count - (self.x / self.count).mT @ (self.r / self.count)

    def residual(self, slope: torch.Tensor) -> float:
        """Variance of r - x · ``slope`` (G, F, O), summed over its entries."""
        variance = self.rr / self.count - (self.r / self.count).square().sum()
        explained = (slope * (2 * self.cross() - self.covariance() @ slope)).sum()
        return float(variance - explained)

    def intercept(self, slope: torch.Tensor) -> torch.Tensor:
        """Mean (G, 1, O) of r - x · ``slope``."""
        return (self.r - self.x @ slope) / self.count


def solve(xx: torch.Tensor, penalty: torch.Tensor, xr: torch.Tensor) -> torch.Tensor:
    """(xx + λ I)⁻¹ xr for covariances ``xx`` (G, F, F) and ``xr`` (G, F, O), with λ = ``penalty``
    (G, 1); 0 where there is no unique solution."""
    regular = xx + torch.diag_embed(penalty.expand(xx.shape[:2]))
    factor, failed = torch.linalg.cholesky_ex(regular)
    return torch.where(failed[:, None, None] == 0, torch.cholesky_solve(xr, factor), 0)


def ridge(moments: Moments, strength: float) -> torch.Tensor:
    """The slope (G, F, O) that minimises |r - x · slope|² + λ |slope|² over centred samples, where
    λ is ``strength`` times the mean square of the features; 0 where there is no unique one."""
    return solve(moments.covariance(), moments.penalty(strength), moments.cross())


def best_ridge(
    moments: Moments, held_back: Moments, strengths: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope (G, F, O) and intercept (G, 1, O) fitted to all samples, ``held_back`` included, with
    the one of the ``strengths`` that predicts those best from the others."""
    errors = {s: held_back.residual(ridge(moments, s)) for s in strengths}
    moments += held_back
    slope = ridge(moments, min(errors, key=errors.__getitem__))
    return slope, moments.intercept(slope)
