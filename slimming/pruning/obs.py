"""Optimal Brain Surgeon for whole inputs of a layer (Hassibi and Stork 1993; Kurtić et al. 2023).

The inputs of a layer are correlated, so that what one contributes others can stand in for. They are
eliminated one by one, each time the one whose loss the others make up for best.
"""

import torch

from slimming.pruning.least_squares import Gram

STRENGTH = 1e-3  # of the ridge, relative to the mean square of the inputs


@torch.no_grad()
def elimination_errors(weight: torch.Tensor, gram: Gram) -> torch.Tensor:
    """The error that each input channel of a layer leaves when it is eliminated: (C,) fp32 on the
    CPU, as a share of the variance of the layer's output.

    ``weight`` (O, C / groups, ...) of the layer, ``gram`` the moments of what it reads. Of inputs
    that can stand in for each other one has a small error and the last that is left a large one.
    """
    groups = len(gram.x)
    grouped = weight.double().unflatten(0, (groups, -1)).flatten(2)
    xx, taps = gram.covariance(), weight[0, 0].numel()
    variance = (grouped @ xx * grouped).sum().clamp_min(torch.finfo(torch.double).tiny)
    ridge = torch.diag_embed(gram.penalty(STRENGTH).expand(xx.shape[:2]))
    inverses = torch.linalg.inv(xx + ridge)
    errors = [_eliminate(w, inverse, taps) for w, inverse in zip(grouped, inverses, strict=True)]
    return (torch.cat(errors) / variance).float().cpu()


def _eliminate(weight: torch.Tensor, inverse: torch.Tensor, taps: int) -> torch.Tensor:
    """Eliminate all inputs of one group: ``weight`` (O, F), ``inverse`` (F, F) of the regularised
    covariance, ``taps`` features an input. The error of each, never less than those before."""
    count = len(inverse) // taps
    errors, left = weight.new_zeros(count), torch.arange(count, device=weight.device)
    largest = weight.new_zeros(())
    while len(left):
        blocks = inverse.view(len(left), taps, len(left), taps)
        own_blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (left, taps, taps)
        own = weight.view(-1, len(left), taps).permute(1, 2, 0)  # (left, taps, O)
        costs = (own * torch.linalg.solve(own_blocks, own)).sum((1, 2))
        place = int(costs.argmin())
        largest = torch.maximum(largest, costs[place])
        errors[left[place]] = largest
        stays = torch.ones(len(left), dtype=torch.bool, device=weight.device)
        stays[place] = False
        left, features = left[stays], stays.repeat_interleave(taps)
        rest, gone = inverse[:, features], inverse[~features]
        update = torch.linalg.solve(gone[:, ~features], gone[:, features])
        weight = weight[:, features] - weight[:, ~features] @ update
        inverse = rest[features] - rest[~features].mT @ update
    return errors
