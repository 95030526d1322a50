"""Ridge regression from sums over samples: no sample is stored."""

from collections.abc import Sequence
from functools import partial

import torch


class Moments:
    """Sums over samples x (G, n, F) and r (G, n, O) of G independent regressions, in fp64."""

    def __init__(self, groups: int, features: int, outputs: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.double, device=device)
        self.count = 0
        self.x = zeros(groups, 1, features)
        self.r = zeros(groups, 1, outputs)
        self.xx = zeros(groups, features, features)
        self.xr = zeros(groups, features, outputs)
        self.rr = zeros(())

    def add(self, x: torch.Tensor, r: torch.Tensor) -> None:
        """Count n more samples."""
        self.count += x.shape[1]
        self.x += x.sum(1, keepdim=True, dtype=torch.double)
        self.r += r.sum(1, keepdim=True, dtype=torch.double)
        self.xx += x.mT @ x
        self.xr += x.mT @ r
        self.rr += r.square().sum(dtype=torch.double)

    def __iadd__(self, other: "Moments") -> "Moments":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def covariances(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cov(x, x) (G, F, F) and Cov(x, r) (G, F, O)."""
        mean = self.x / self.count
        xx = self.xx / self.count - mean.mT @ mean
        return xx, self.xr / self.count - mean.mT @ (self.r / self.count)

    def variance(self) -> float:
        """Variance of r, summed over its entries."""
        return float(self.rr / self.count - (self.r / self.count).square().sum())

    def residual(self, slope: torch.Tensor) -> float:
        """Variance of r - x · ``slope`` (G, F, O), summed over its entries."""
        xx, xr = self.covariances()
        return self.variance() - float((slope * (2 * xr - xx @ slope)).sum())

    def intercept(self, slope: torch.Tensor) -> torch.Tensor:
        """Mean (G, 1, O) of r - x · ``slope``."""
        return (self.r - self.x @ slope) / self.count


def ridge(moments: Moments, strength: float) -> torch.Tensor:
    """The slope (G, F, O) that minimises |r - x · slope|² + λ |slope|² over centred samples, where
    λ is ``strength`` times the mean square of the features; 0 where there is no unique one."""
    xx, xr = moments.covariances()
    squares = moments.xx.diagonal(dim1=1, dim2=2) / moments.count
    xx.diagonal(dim1=1, dim2=2).add_(strength * squares.mean(1, keepdim=True))
    factor, failed = torch.linalg.cholesky_ex(xx)
    solved = torch.cholesky_solve(xr, factor)
    return torch.where(failed[:, None, None] == 0, solved, 0)


def best_ridge(
    moments: Moments, held_back: Moments, strengths: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope (G, F, O) and intercept (G, 1, O) fitted to all samples, ``held_back`` included, with
    the one of the ``strengths`` that predicts those best from the others."""
    errors = {s: held_back.residual(ridge(moments, s)) for s in strengths}
    moments += held_back
    slope = ridge(moments, min(errors, key=errors.__getitem__))
    return slope, moments.intercept(slope)
