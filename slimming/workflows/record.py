"""What the stages of one experiment (run.py) found."""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn

from slimming.measuring import profiling
from slimming.pruning import importance
from slimming.storage import architecture, files
from slimming.storage.architecture import Network
from slimming.training import loop

WEIGHTS = "weights that are not zero"


class Record:
    """What the stages found, kept in metrics.json."""

    def __init__(self, path: Path, args: argparse.Namespace):
        self.path = path
        self.facts = {"stages": []}
        if not args.skip_pruning:
            self.facts |= {"method": args.pruning_method, "ratio": args.pruning_ratio}
        if path.exists():
            self.facts = json.loads(path.read_text())

    def done(self, name: str) -> bool:
        return any(stage["name"] == name for stage in self.facts["stages"])

    def add(
        self, name: str, path: Path, score: loop.Score, began: float, history=(), **more
    ) -> None:
        """A stage that ended with the network in ``path``; ``history``: its epochs."""
        model, network, _ = architecture.load(path)
        stage = {"name": name, **figures(model, network, score), "file": path.name}
        stage["history"] = list(history)
        stage |= {"bytes": profiling.count_bytes(model), "seconds": time.perf_counter() - began}
        self.facts["stages"].append(stage)
        self.update(**more)
        print(stage_text(stage), flush=True)

    def update(self, **facts) -> None:
        self.facts.update(facts)
        files.write_bytes(self.path, json.dumps(self.facts, indent=1).encode())


def figures(model: nn.Module, network: Network, score: loop.Score) -> dict:
    """Accuracy, size and work of a network; "effective" is without weights that are zero."""
    parameters, flops = profiling.count_effective(model, network.image_size)
    return {
        "top-1": score.prec1,
        "loss": score.loss,
        "parameters": profiling.count_parameters(model),
        "effective parameters": parameters,
        "FLOPs": profiling.count_flops(model, network.image_size),
        "effective FLOPs": flops,
    }


def stage_text(stage: dict) -> str:
    """One line: accuracy, size and work of a stage's network."""
    text = f"{stage['name']}: top-1 {stage['top-1']:.2%}, loss {stage['loss']:.4f}, "
    text += f"{stage['parameters']:,} parameters, {stage['FLOPs'] / 1e6:.1f} MFLOPs an image"
    if stage["effective parameters"] != stage["parameters"]:
        text += f" (not counting zeros: {stage['effective parameters']:,}, "
        text += f"{stage['effective FLOPs'] / 1e6:.1f})"
    return text


def layer_by_layer(before: nn.Module, after: nn.Module, weights: bool) -> dict[str, list]:
    """What is counted -> [name, before, after] of each layer: filters and, with ``weights``, the
    weights that are not zero; then filters only where some are removed."""
    old, new = importance.layers(before), importance.layers(after)
    counts = {"filters": len}
    if weights:
        counts[WEIGHTS] = torch.count_nonzero
    found = {
        counted: [
            [name, int(count(old[name].weight)), int(count(new[name].weight))] for name in old
        ]
        for counted, count in counts.items()
    }
    if weights and all(before == after for _, before, after in found["filters"]):
        del found["filters"]
    return found
