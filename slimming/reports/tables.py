"""Text tables."""

import torch
from torch import nn

from slimming.pruning.choice import Choice
from slimming.pruning.sparsity import NEAR_ZERO, alive_factors, near_zero

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first one left-aligned, the others right-aligned."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def sparsity_text(model: nn.Module) -> str:
    """The sparsity of γ, which tells how much can be pruned without harm."""
    factors = alive_factors(model)
    if not len(factors):
        return "scaling factors: none"
    values = factors.quantile(torch.tensor(QUANTILES)).tolist()
    return (
        f"scaling factors: {near_zero(model):.1%} of {len(factors)} channels have |γ| < "
        f"{NEAR_ZERO}\n"
        + table(
            ["quantile", *(f"{q:.0%}" for q in QUANTILES)],
            [["|γ|", *(f"{value:.2g}" for value in values)]],
        )
    )


def layers_text(choice: Choice) -> str:
    """The channels of each layer before and after pruning."""
    rows = []
    for name, alive in choice.alive.items():
        before, after = int(alive.sum()), int(choice.keep[name].sum())
        rows.append(_layer_row(name, before, after))
    rows.append(_layer_row("all", *choice.channels))
    return table(["BN layer", "before", "after", "pruned"], rows)


def _layer_row(name: str, before: int, after: int) -> list[str]:
    pruned = max(0, 1 - after / before) if before else 0
    return [name, str(before), str(after), f"{pruned:.1%}"]


def least_warnings(choice: Choice) -> list[str]:
    """A warning if layers keep only what they must."""
    if not choice.rescued:
        return []
    names = ", ".join(choice.rescued)
    return [f"these layers would lose more channels, but keep the least allowed: {names}"]


def rounding_warnings(choice: Choice) -> list[str]:
    """A warning if rounding undoes most of the pruning."""
    before, after = choice.channels
    if not choice.ratio or choice.spared <= before - after:
        return []
    would = choice.spared + before - after
    return [
        f"`round_to` keeps {choice.spared} of the {would} channels that would have been pruned: "
        "use a smaller multiple, or prune a larger fraction, to remove more"
    ]
