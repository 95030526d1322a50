"""OpenVINO files: a graph (.xml) and its weights (.bin)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from slimming.measuring.export import int8
from slimming.measuring.export.quiet import quietly

SECTION = "network_slimming"  # of the file's runtime information


def write(
    program: ExportedProgram,
    path: Path,
    precision: str,
    batches: Sequence[torch.Tensor],
    metadata: Mapping[str, str],
) -> list[Path]:
    """Write a graph with the input "images" and the output "logits". Of bf16 and fp16 the weights
    are stored as fp16, if they are in its range: the engine decides what it computes in by its
    INFERENCE_PRECISION_HINT."""
    import openvino

    with quietly():
        model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({"images"})
    model.outputs[0].get_tensor().set_names({"logits"})
    if precision == "int8":
        model = int8.by_nncf(model, [batch.numpy() for batch in batches])
    for name, value in metadata.items():
        model.set_rt_info(value, [SECTION, name])
    half = precision in ("bf16", "fp16") and all(map(_fits_fp16, program.state_dict.values()))
    openvino.save_model(model, str(path), compress_to_fp16=half)
    return [path, path.with_suffix(".bin")]


def _fits_fp16(tensor: torch.Tensor) -> bool:
    """Whether no finite value becomes infinite: bounds of clamps may be large."""
    finite = tensor[tensor.isfinite()]
    return bool((finite.abs() <= torch.finfo(torch.float16).max).all())
