"""metrics.json: the results of the stages of an experiment."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming.channels.scaling import present_channels, selections
from slimming.choosing import importance
from slimming.measuring.figures import Figures, measure
from slimming.reports.tables import stage_text
from slimming.storage import architecture, files
from slimming.storage.architecture import Architecture
from slimming.training import loop

WEIGHTS = "weights that are not zero"


class Record:
    """The results of the stages, ``facts``, saved to metrics.json; initially the given ones."""

    def __init__(self, path: Path, **facts: Any):
        self.path = path
        self.facts = {"stages": [], **facts}
        if path.exists():
            self.facts = json.loads(path.read_text())

    def done(self, name: str) -> bool:
        """Whether the stage ``name`` is finished."""
        return any(stage["name"] == name for stage in self.facts["stages"])

    def stage(self, name: str) -> dict[str, Any]:
        """The results of the stage ``name``."""
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
        """Add a finished stage, with its network in ``path``; ``history``: its epochs."""
        model, network, _ = architecture.load(path)
        figures = figures_of(model, network, score)
        stage = {"name": name, **figures.record(), "file": path.name, "history": list(history)}
        self.facts["stages"].append({**stage, "seconds": time.perf_counter() - began})
        self.update(**more)
        print(stage_text(name, figures), flush=True)

    def update(self, **facts: Any) -> None:
        """Add ``facts``, and write the file."""
        self.facts.update(facts)
        files.write_bytes(self.path, json.dumps(self.facts, indent=1).encode())


def figures_of(model: nn.Module, network: Architecture, score: loop.Score) -> Figures:
    """The figures of a network: accuracy, size and FLOPs."""
    images = torch.zeros(1, 3, network.image_size, network.image_size)
    (figures,) = measure([model], images, scores=[score])
    return figures


def layer_by_layer(before: nn.Module, after: nn.Module, weights: bool) -> dict[str, list]:
    """What is counted -> [name, before, after] of each layer: filters and, with ``weights``, the
    nonzero weights; then filters only if some are removed. For a channel selection, the channels
    that it keeps."""
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
