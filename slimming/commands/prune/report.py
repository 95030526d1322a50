"""A summary of pruning in the format of the suite of preact_res20."""

import os
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from slimming.choosing.threshold import Choice
from slimming.slicing.slim import cfg_of

MEBIBYTE = 2**20


class Job(Protocol):
    """The network before pruning, its file, and the file of the slim network."""

    path: Path
    target: Path
    model: nn.Module


def text(job: Job, slim: nn.Module, choice: Choice, before: dict, after: dict) -> str:
    """The summary of the records that `run.save_pruned` returned. As in that suite,
    parameters include the masks of channel selection, and sizes are those of the two files."""
    files, cfg = (job.path, job.target), cfg_of(slim)
    sizes = [path.stat().st_size / MEBIBYTE for path in files]
    counts = [sum(p.numel() for p in model.parameters()) for model in (job.model, slim)]
    lines = [
        f"Loading checkpoint from {job.path}",
        *(_layer(name, alive, choice.kept[name]) for name, alive in choice.alive.items()),
        f"cfg {len(cfg)}: {cfg}",
        f"Pruned model save to: {os.path.join('.', job.target)}",
        f"Pruned rate: {choice.ratio:g}",
        f"Model {_score(before)}",
        f"Pruned model {_score(after)}",
        _reduced("Time", "{:.2f}s -> {:.2f}s", before["seconds"], after["seconds"]),
        _reduced("Model params", "{:.2f} -> {:.2f}", *counts),
        _reduced("Model size", "{:.2f}mb->{:.2f}mb", *sizes),
    ]
    return "\n".join(lines)


def _layer(name: str, alive: torch.Tensor, keep: torch.Tensor) -> str:
    before, gone = int(alive.sum()), int(alive.sum() - keep.sum())
    return f"BN layer name: {name}\tpruned {gone / max(1, before):.2%}({gone}/{before})"


def _score(record: dict) -> str:
    top1, loss, seconds = record["top-1"], record["loss"], record["seconds"]
    return f"acc:{100 * top1:.3f} loss: {loss:.3f} time: {seconds:.3f}s"


def _reduced(name: str, form: str, before: float, after: float) -> str:
    return f"{name} reduce: {1 - after / before:.4%} ({form.format(before, after)})"
