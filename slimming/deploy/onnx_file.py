"""ONNX files, for ONNX Runtime and many other engines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from slimming.deploy import int8
from slimming.deploy.graph import is_weight
from slimming.deploy.quiet import quietly

INPUT, OUTPUT = "images", "logits"


def write(
    program: ExportedProgram,
    path: Path,
    precision: str,
    batches: Sequence[torch.Tensor],
    metadata: Mapping[str, str],
) -> list[Path]:
    """Write a graph with the input `INPUT` and the output `OUTPUT`; ``metadata`` become its
    metadata properties. bf16 stores weights only: ONNX Runtime computes them in fp32."""
    import onnx

    with quietly():
        exported = torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
        )
    assert exported is not None  # as it would be of the older exporter
    model = exported.model_proto
    for value in (*model.graph.input, *model.graph.output):
        batch = value.type.tensor_type.shape.dim[0]
        if batch.dim_param:
            batch.dim_param = "batch"
    if precision == "int8":
        model = int8.by_onnxruntime(model, [{INPUT: batch.numpy()} for batch in batches])
        compact(model.graph)
    _strip(model)
    if precision == "bf16":
        _store_as_bf16(model)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return [path]


def _strip(model: Any) -> None:
    """Drop what the exporter notes of its source: lines of code, paths, names of modules."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    del graph.value_info[:]


def compact(graph: Any) -> None:
    """Make a graph of quantizers smaller, which may take a fourth of the file: drop zero points
    that are 0 where that is the default, and all names but those of weights, inputs and outputs."""
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        node.name = ""
        if node.op_type == "DequantizeLinear" and len(node.input) == 3:
            point = values.get(node.input[2])
            # uint8: that of the quantizer before
            if point is not None and point.dtype != np.uint8 and not point.any():
                del node.input[2]
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    named = {"", *(value.name for value in (*graph.input, *graph.output))}  # "": an omitted input
    named |= {name for name, value in values.items() if is_weight(value.shape)}
    short: dict[str, str] = {}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [n if n in named else short.setdefault(n, str(len(short))) for n in names]
    for tensor in graph.initializer:
        tensor.name = short.get(tensor.name, tensor.name)


def _store_as_bf16(model: Any) -> None:
    """Store the weights as bf16, each with a Cast to fp32, which engines compute once."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or not is_weight(tensor.dims):
            continue
        weight = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        name, short = tensor.name, f"{tensor.name}.bf16"
        raw = weight.bfloat16().view(torch.int16).numpy().tobytes()
        stored = helper.make_tensor(short, TensorProto.BFLOAT16, weight.shape, raw, raw=True)
        tensor.CopyFrom(stored)
        casts.append(helper.make_node("Cast", [short], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
