"""Optimal Brain Surgeon for whole inputs of a layer (Hassibi and Stork 1993; Kurtić et al. 2023).

The inputs of a layer are correlated, so that the others can partly replace one that is removed.
Inputs are eliminated one by one, each time the one whose removal increases the error least after
the remaining weights are refitted.
"""

import math

import torch

from slimming.choosing.moments import STRENGTH, Gram

CANDIDATES = 16  # inputs among which one is chosen at each step, at least
TINY = 1e-30


@torch.no_grad()
def elimination_errors(weight: torch.Tensor, gram: Gram) -> torch.Tensor:
    """The error that each input channel of a layer leaves when it is eliminated: (C,) fp32 on the
    CPU, as a fraction of the variance of the layer's output.

    ``weight`` (O, C / groups, ...) is that of the layer, ``gram`` the moments of its inputs. Of
    inputs that can replace each other, all but the last one eliminated have a small error.
    """
    groups = len(gram.x)
    grouped = weight.double().clone().unflatten(0, (groups, -1)).flatten(2)
    xx, taps = gram.covariance(), weight[0, 0].numel()
    variance = (grouped @ xx * grouped).sum()
    if variance <= 0:  # all inputs are constant: a bias replaces them
        return torch.zeros(groups * xx.shape[1] // taps)
    ridge = gram.penalty(STRENGTH).clamp_min(TINY).expand(xx.shape[:2])
    inverses = torch.linalg.inv(xx + torch.diag_embed(ridge))
    errors = [_eliminate(w, inverse, taps) for w, inverse in zip(grouped, inverses, strict=True)]
    return (torch.cat(errors) / variance).float().cpu()


def _eliminate(weight: torch.Tensor, inverse: torch.Tensor, taps: int) -> torch.Tensor:
    """Eliminate all inputs of one group: ``weight`` (O, F), ``inverse`` (F, F) of the regularised
    covariance, ``taps`` features an input. The error of each, never less than those before."""
    errors, largest = weight.new_zeros(len(inverse) // taps), 0.0
    left = torch.arange(len(errors), device=weight.device)
    alive = torch.ones_like(left, dtype=torch.bool)  # of those that the matrix still holds
    while alive.any():
        each = _costs(weight, inverse, taps).masked_fill(~alive, math.inf)
        order = each.argsort()[: int(alive.sum())]
        few = order[: max(CANDIDATES, len(order) // 8)]
        # costs only grow with eliminations: the candidates below this bound are the cheapest of all
        bound = float(each[order[len(few)]]) if len(few) < len(order) else math.inf
        features = _features(few, taps)
        chosen, costs = _cheapest(weight[:, features], inverse[features][:, features], taps, bound)
        gone = few[chosen]
        for place, cost in zip(gone.tolist(), costs, strict=True):
            largest = max(largest, cost)
            errors[left[place]] = largest
        alive[gone] = False
        _clear(weight, inverse, _features(gone, taps))
        if alive.sum() < 0.7 * len(alive):  # a smaller matrix pays for the copy
            features = _features(alive.nonzero().flatten(), taps)
            weight, inverse = weight[:, features], inverse[features][:, features]
            left, alive = left[alive], alive[alive]
    return errors


def _clear(weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> None:
    """Refit the weights without the features ``gone`` and update the inverse, both in place. The
    diagonal of the inverse is 1 at these features."""
    rows = inverse[gone]
    update = torch.linalg.solve(rows[:, gone], rows)
    weight -= weight[:, gone] @ update
    inverse.addmm_(rows.mT, update, alpha=-1)
    inverse[gone, gone] = 1


def _cheapest(
    weight: torch.Tensor, inverse: torch.Tensor, taps: int, bound: float
) -> tuple[list[int], list[float]]:
    """The inputs to eliminate, cheapest first, and their costs: those that cost at most ``bound``,
    and at least one. Changes ``weight`` and ``inverse`` in place."""
    alive = torch.ones(len(inverse) // taps, dtype=torch.bool, device=weight.device)
    chosen: list[int] = []
    costs: list[float] = []
    while alive.any():
        each = _costs(weight, inverse, taps).masked_fill(~alive, math.inf)
        place = each.argmin()
        if chosen and each[place] > bound:
            break
        chosen.append(int(place))
        costs.append(float(each[place]))
        alive[place] = False
        _clear(weight, inverse, _features(place[None], taps))
    return chosen, costs


def _costs(weight: torch.Tensor, inverse: torch.Tensor, taps: int) -> torch.Tensor:
    """The increase of the error if each input alone is eliminated: tr(w B⁻¹ wᵀ), with its weights w
    and its block B of the inverse."""
    count = len(inverse) // taps
    blocks = inverse.view(count, taps, count, taps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    own = weight.view(-1, count, taps).permute(1, 2, 0)  # (count, taps, O)
    return (own * torch.linalg.solve(blocks, own)).sum((1, 2))


def _features(inputs: torch.Tensor, taps: int) -> torch.Tensor:
    return (inputs[:, None] * taps + torch.arange(taps, device=inputs.device)).flatten()
