"""The formats of exported files, by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.export import ExportedProgram

from slimming.deploy import onnx_file, openvino_file, torch_file
from slimming.deploy.quiet import quietly
from slimming.runtime import optional

REQUIREMENTS = "requirements-export.txt"  # what all formats need
PRECISIONS = ("fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class Format:
    """A format, and the engine that runs its files.

    ``write(program, path, precision, batches, metadata)`` writes a graph to ``path``, which ends in
    ``suffix``, and returns all files that it wrote; ``batches`` calibrate int8. ``modules``: the
    packages that it needs, ``for_int8``: more of them. ``traced_in``: precisions whose graph is
    traced in that dtype; of the others in fp32.
    """

    suffix: str
    write: Callable[
        [ExportedProgram, Path, str, Sequence[torch.Tensor], Mapping[str, str]], list[Path]
    ]
    modules: tuple[str, ...] = ()
    for_int8: tuple[str, ...] = ()
    traced_in: Mapping[str, torch.dtype] = field(default_factory=dict)

    def check(self, name: str, precision: str) -> None:
        """UserError if a package that it needs is not installed."""
        for module in (*self.modules, *(self.for_int8 if precision == "int8" else ())):
            with quietly():
                purpose = f"`format` {name} `precision` {precision}"
                optional.need(module, module, purpose, f"-r {REQUIREMENTS}")

    def dtype(self, precision: str) -> torch.dtype:
        """The dtype in which the graph is traced."""
        return self.traced_in.get(precision, torch.float32)


FORMATS = {
    "onnx": Format(
        ".onnx",
        onnx_file.write,
        ("onnx", "onnxscript", "onnxruntime"),
        traced_in={"fp16": torch.float16},
    ),
    "openvino": Format(".xml", openvino_file.write, ("openvino",), ("nncf",)),
    "torch": Format(
        ".pt2",
        torch_file.write,
        (),
        ("nncf", "torchao"),
        {"fp16": torch.float16, "bf16": torch.bfloat16},
    ),
}
