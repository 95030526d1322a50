"""The points of a sweep as text."""

from collections.abc import Mapping
from typing import Any

from slimming.reports.figures import scores_text

COLUMNS = {  # title -> format; accuracy is of held-back training images
    "allocation": "{:<12}",
    "pruned": "{:>7}",
    "parameters": "{:>11}",
    "FLOPs": "{:>7}",
    "latency": "{:>8}",
    "as pruned": "{:>10}",
    "repaired": "{:>9}",
    "layer by layer": "{:>15}",
}


def dense(facts: Mapping[str, Any]) -> str:
    """One line about the dense network."""
    known = facts["dense"]
    return (
        f"{facts['network']}: {known['parameters']:,} parameters, {known['FLOPs'] / 1e6:.1f} "
        f"MFLOPs, top-1 {known['held back']:.2%} on held-back training images"
    )


def header(exact: bool = False) -> str:
    """The titles of the columns; ``exact`` adds that of repair layer by layer."""
    return _row(list(COLUMNS)[: None if exact else -1])


def line(point: Mapping[str, Any]) -> str:
    """One line about a point; costs as fractions of the dense network's."""
    costs = [f"{point[name]:.1%}" for name in ("params", "flops", "latency")]
    tops = [f"{point[name]:.2%}" for name in ("pruned", "repaired", "exact") if name in point]
    return _row([point["allocation"], f"{point['ratio']:.1%}", *costs, *tops])


def chosen(facts: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """What was chosen, how it scores on test images, and the command that prunes there."""
    best = facts["chosen"]
    scores = {name: (score["loss"], score["prec1"]) for name, score in best["test"].items()}
    way = "layer by layer" if best["exact"] else "in one pass"
    return (
        f"\n{facts['why']}: {point['allocation']}, {point['ratio']:.1%} pruned: "
        f"{point['params']:.1%} of the parameters, {point['flops']:.1%} of the FLOPs, "
        f"{point['latency']:.1%} of the latency\n\n"
        f"on test images, repaired {way}:\n{scores_text(scores)}\n\n"
        f"prune there, and repair layer by layer, with\n  {point['command']}"
    )


def _row(cells: list[str]) -> str:
    formats = zip(COLUMNS.values(), cells, strict=False)
    return "".join(form.format(cell) for form, cell in formats)
