"""PyTorch files (.pt2): a program of torch.export, for PyTorch without the code of the network."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from slimming.deploy import int8
from slimming.deploy.graph import exported, is_dynamic
from slimming.deploy.quiet import quietly


def write(
    program: ExportedProgram,
    path: Path,
    precision: str,
    batches: Sequence[torch.Tensor],
    metadata: Mapping[str, str],
) -> list[Path]:
    """Write a program; ``metadata`` are its extra file metadata.json. int8 is a graph of quantize
    and dequantize operators, which torch.compile fuses."""
    if precision == "int8":
        program = _requantized(program, batches)
    with quietly():
        facts, file = {"metadata.json": json.dumps(dict(metadata))}, io.BytesIO()
        torch.export.save(program, file, extra_files=facts)  # to a full disk, it would abort
    path.write_bytes(file.getbuffer())
    return [path]


def _requantized(program: ExportedProgram, batches: Sequence[torch.Tensor]) -> ExportedProgram:
    (example,), _ = program.example_inputs
    with torch.no_grad():
        floats = [batch.float() for batch in batches]  # NNCF takes means of the input
        model = int8.by_nncf(program.module(), floats)
    fed = _AsFloat(model) if example.dtype == torch.uint8 else model
    return exported(fed, example, is_dynamic(program))


class _AsFloat(torch.nn.Module):
    """``model``, whose first operator quantizes floats, for pixels."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.float())
