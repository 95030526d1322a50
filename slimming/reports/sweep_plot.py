"""A sweep as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimming.pruning.front import front
from slimming.reports.plots import blank_figure, picture, to_png, write_picture

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


def write(path: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write the picture, if matplotlib is available; return the files that were written."""
    return write_picture(path, draw(facts))


@picture
def draw(facts: Mapping[str, Any]) -> bytes:
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
