"""A sweep as text, picture and page."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from slimming.choosing.budget import front
from slimming.reports.plots import blank_figure, picture, to_png, write_picture
from slimming.reports.tables import scores_text

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


def dense_line(facts: Mapping[str, Any]) -> str:
    """One line about the dense network."""
    known = facts["dense"]
    return (
        f"{facts['network']}: {known['parameters']:,} parameters, {known['FLOPs'] / 1e6:.1f} "
        f"MFLOPs, top-1 {known['held back']:.2%} on held-back training images"
    )


def header(exact: bool = False) -> str:
    """The titles of the columns; ``exact`` adds that of repair layer by layer."""
    return _row(list(COLUMNS)[: None if exact else -1])


def point_line(point: Mapping[str, Any]) -> str:
    """One line about a point; costs as fractions of the dense network's."""
    costs = [f"{point[name]:.1%}" for name in ("params", "flops", "latency")]
    tops = [f"{point[name]:.2%}" for name in ("pruned", "repaired", "exact") if name in point]
    return _row([point["allocation"], f"{point['ratio']:.1%}", *costs, *tops])


def chosen_line(facts: Mapping[str, Any], point: Mapping[str, Any]) -> str:
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


COLORS = {"global": "#1f5a96", "uniform": "#c23b22", "lamp": "#2d8a4e", "search": "#8a5a9e"}
COSTS = {"flops": "FLOPs", "params": "parameters", "latency": "latency"}


def by_allocation(facts: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The points of each allocation in order of cost; of the random candidates, called search,
    only their Pareto front."""
    cost = facts["cost"]
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in COLORS}
    for point in sorted(facts["points"], key=lambda p: (p[cost], -p["repaired"])):
        random = point["allocation"].startswith("random-")
        curves["search" if random else point["allocation"]].append(point)
    searched = curves["search"]
    best = front([(point[cost], point["repaired"]) for point in searched])
    curves["search"] = [searched[i] for i in best]
    return {name: curve for name, curve in curves.items() if curve}


def write_plot(path: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write the picture, if matplotlib is available; return the files that were written."""
    return write_picture(path, draw_points(facts))


@picture
def draw_points(facts: Mapping[str, Any]) -> bytes:
    """A PNG picture of accuracy by cost and by percentage, as pruned and repaired."""
    figure, axes = blank_figure(1, 2, (12, 4.6))
    best = next(p for p in facts["points"] if p["id"] == facts["chosen"]["id"])
    accuracy = 100 * facts["dense"]["held back"]
    for part, key, name in zip(axes, (facts["cost"], "ratio"), ("", "channels"), strict=True):
        for allocation, points in by_allocation(facts).items():
            points = sorted(points, key=lambda p: p[key])
            places, color = [100 * p[key] for p in points], COLORS[allocation]
            tops = [100 * p.get("exact", p["repaired"]) for p in points]
            part.plot(places, tops, ".-", color=color, label=allocation)
            part.plot(places, [100 * p["pruned"] for p in points], ":", color=color, alpha=0.6)
        part.axhline(accuracy, color="#5b6875", linewidth=0.8, label="dense")
        top = 100 * best.get("exact", best["repaired"])
        part.plot(
            100 * best[key], top, "o", markersize=11, fillstyle="none", color="#12171d",
            label=f"{facts['why'].partition(',')[0].removeprefix('the ')}: {best['allocation']}",
        )  # fmt: skip
        label = f"{COSTS[facts['cost']]} (% of the dense network)" if not name else ""
        part.set(xlabel=label or "channels pruned (%)")
        part.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 on held-back training images (%)")
    axes[0].legend(fontsize=8)
    note, corner = "solid: repaired\ndotted: as pruned", axes[1].transAxes
    axes[1].text(0.03, 0.05, note, fontsize=8, transform=corner)
    return to_png(figure, facts["title"])


TEMPLATE = "sweep.html"
PLACE = "/* the sweep */ null"


def page(facts: Mapping[str, Any]) -> str:
    """The page of a sweep, with its ``facts`` as `slimming.commands.sweep` records them."""
    template = resources.files("slimming.reports").joinpath(TEMPLATE).read_text(encoding="utf-8")
    # in a script, "</script>" or "<!--" in a string would end it
    data = json.dumps({**facts, "costs": COSTS}).replace("<", "\\u003c")
    assert template.count(PLACE) == 1
    return template.replace(PLACE, data)
