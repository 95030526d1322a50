"""What the stages of an experiment found."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming.measuring.figures import Figures, measure
from slimming.pruning import importance
from slimming.pruning.scaling import present_channels, selections
from slimming.reports.figures import stage_text
from slimming.storage import architecture, files
from slimming.storage.architecture import Architecture
from slimming.training import loop

WEIGHTS = "weights that are not zero"


class Record:
    """What the stages found, kept in metrics.json: ``facts``, beginning with those that are
    given."""

    def __init__(self, path: Path, **facts: Any):
        self.path = path
        self.facts = {"stages": [], **facts}
        if path.exists():
            self.facts = json.loads(path.read_text())

    def done(self, name: str) -> bool:
        """Whether the stage called ``name`` has ended."""
        return any(stage["name"] == name for stage in self.facts["stages"])

    def stage(self, name: str) -> dict[str, Any]:
        """What the stage called ``name`` found."""
        return next(stage for stage in self.facts["stages"] if stage["name"] == name)

    def add(
        self,
        name: str,
        path: Path,
        score: loop.Score,
        began: float,
        history: Sequence[dict[str, Any]] = (),
        **more: Any,
    ) -> None:
        """A stage that ended with the network in ``path``; ``history``: its epochs."""
        model, network, _ = architecture.load(path)
        figures = figures_of(model, network, score)
        stage = {"name": name, **figures.record(), "file": path.name, "history": list(history)}
        self.facts["stages"].append({**stage, "seconds": time.perf_counter() - began})
        self.update(**more)
        print(stage_text(name, figures), flush=True)

    def update(self, **facts: Any) -> None:
        """Note ``facts``, and write the file."""
        self.facts.update(facts)
        files.write_bytes(self.path, json.dumps(self.facts, indent=1).encode())


def figures_of(model: nn.Module, network: Architecture, score: loop.Score) -> Figures:
    """Accuracy, size and work of a network."""
    images = torch.zeros(1, 3, network.image_size, network.image_size)
    (figures,) = measure([model], images, scores=[score])
    return figures


def layer_by_layer(before: nn.Module, after: nn.Module, weights: bool) -> dict[str, list]:
    """What is counted -> [name, before, after] of each layer: filters and, with ``weights``, the
    weights that are not zero; then filters only where some are removed. Of a channel selection the
    channels count that it passes on."""
    old, new = importance.layers(before), importance.layers(after)
    counts: dict[str, Callable[[torch.Tensor], int | torch.Tensor]] = {"filters": len}
    if weights:
        counts[WEIGHTS] = torch.count_nonzero
    rows = {
        counted: [
            [name, int(count(old[name].weight)), int(count(new[name].weight))] for name in old
        ]
        for counted, count in counts.items()
    }
    passed = [present_channels(model) for model in (before, after)]
    for norm, name in selections(before).items():
        rows["filters"].append([name, *(int(masks[norm].sum()) for masks in passed)])
    if weights and all(before == after for _, before, after in rows["filters"]):
        del rows["filters"]
    return rows
