"""OpenVINO files: a graph (.xml) and its weights (.bin)."""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from slimming.deploy import int8
from slimming.deploy.graph import is_dynamic, is_weight
from slimming.deploy.quiet import interrupted_later, quietly

FULL = 2**16  # bytes that are left on a full disk
SECTION = "network_slimming"  # of the file's runtime information


def write(
    program: ExportedProgram,
    path: Path,
    precision: str,
    batches: Sequence[torch.Tensor],
    metadata: Mapping[str, str],
) -> list[Path]:
    """Write a graph with the input "images" and the output "logits". Of bf16 and fp16 the weights
    are stored in that type (fp16 if all values are in its range): what the engine computes in is
    decided by its INFERENCE_PRECISION_HINT."""
    import openvino

    with quietly():
        with interrupted_later():
            model = openvino.convert_model(program)
        (example,), _ = program.example_inputs
        batch = -1 if is_dynamic(program) else len(example)
        model.reshape([batch, *example.shape[1:]])  # the converter leaves all sizes open
    model.inputs[0].get_tensor().set_names({"images"})
    model.outputs[0].get_tensor().set_names({"logits"})
    if precision == "int8":
        model = int8.by_nncf(model, [batch.numpy() for batch in batches])
    for name, value in metadata.items():
        model.set_rt_info(value, [SECTION, name])
    if precision == "bf16" or (precision == "fp16" and _fits_fp16(program)):
        _store_in(model, precision)
    try:
        openvino.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as error:
        if shutil.disk_usage(path.parent).free < FULL:  # it says "iostream error"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    return [path, path.with_suffix(".bin")]


def _store_in(model: Any, precision: str) -> None:
    """Store the weights in bf16 or fp16, each with a conversion to fp32, which the engine does
    once."""
    from openvino import Type, opset13

    dtype = {"bf16": Type.bf16, "fp16": Type.f16}[precision]
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != Type.f32:
            continue
        if is_weight(node.data.shape):
            short = opset13.constant(node.data, dtype=dtype)
            node.output(0).replace(opset13.convert(short, "f32").output(0))


def _fits_fp16(program: ExportedProgram) -> bool:
    """Whether no finite value is out of the range of fp16. A clamp at a large bound comes with tiny
    weights in the next layer, which has γ in it: fp16 would store them inexactly."""
    values = [tensor[tensor.isfinite()].abs() for tensor in program.state_dict.values()]
    return all(bool((value <= torch.finfo(torch.float16).max).all()) for value in values)
