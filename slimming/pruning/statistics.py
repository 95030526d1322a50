"""Statistics of the inputs of BatchNorm."""

from collections.abc import Iterable

import torch

from slimming.channels.widths import BatchNorm

LARGEST = 100.0  # limit of the factor by which a running variance changes


def rows(value: torch.Tensor) -> torch.Tensor:
    """Maps (N, C, ...) as rows (n, C)."""
    return value.movedim(1, -1).flatten(0, -2)


def mean_and_variance(values: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (C,) of all rows of some (N, C, ...), in fp64."""
    counts, means, variances = [], [], []
    for value in values:
        var, mean = torch.var_mean(rows(value), 0, correction=0)
        counts.append(value.numel() // value.shape[1])
        means.append(mean.double())
        variances.append(var.double())
    share = torch.tensor(counts, dtype=torch.double, device=means[0].device)[:, None] / sum(counts)
    mean = (share * torch.stack(means)).sum(0)
    return mean, (share * (torch.stack(variances) + (torch.stack(means) - mean).square())).sum(0)


def move_statistics(
    norm: BatchNorm, shift: torch.Tensor, var: torch.Tensor, var_before: torch.Tensor
) -> None:
    """Move the running mean of ``norm`` by ``shift`` (C,), and its running variance by the ratio of
    the variances (C,) of its input after and before.

    The statistics are not replaced by those of these images, which differ from the running ones
    even if nothing was pruned.
    """
    assert norm.running_mean is not None and norm.running_var is not None  # eval mode needs both
    ratio = torch.where(var_before > 0, var / var_before, 1).clamp(1 / LARGEST, LARGEST)
    norm.running_mean += shift
    norm.running_var *= ratio
