"""Compare quantizers: ONNX Runtime's and NNCF's, each in both engines, on pruned networks.

python benchmarks/quantization.py logs/res-refined --data DIR [--images 2048]
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from slimming.cli import entry
from slimming.commands.export import run as exporting
from slimming.commands.export.settings import ExportRun
from slimming.deploy import engines, int8, onnx_file, openvino_file
from slimming.deploy.fold import deploy, forms_of
from slimming.deploy.graph import traced
from slimming.settings import build

HEADER = [
    "network",
    "FLOPs",
    "quantizer",
    "engine",
    "form",
    "top-1",
    "drop",
    "MB",
    "ms",
    "micro-batch",
]
ROUNDS = 15


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="+", help="checkpoints, or their folders")
    parser.add_argument("--data", help="folder of their dataset")
    parser.add_argument("--images", type=int, default=2048, help="that calibrate (default: 2048)")
    parser.add_argument("--test-images", type=int, help="to judge on (default: all)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    for path in args.model:
        values = {"checkpoint": str(path), "data": args.data, "no_cuda": True}
        values |= {"format": ("onnx", "openvino"), "precision": ("fp32", "int8")}
        values |= {"calibration_images": args.images, "test_images": args.test_images}
        network = exporting.load(build(ExportRun, values))
        with tempfile.TemporaryDirectory() as folder:
            rows = list(compared(network, Path(folder)))
        rows = measure.merged("quantization-cpu", rows, HEADER[:4])
        measure.write("quantization-cpu", measure.machine(torch.device("cpu")), HEADER, rows)


def compared(network: exporting.Source, folder: Path) -> Iterator[dict]:
    """A row for each quantizer and engine, with the form of the graph that is faster there."""
    forms = {n: f for n, f in forms_of(network.model).items() if f.fold and not f.clamp}
    found = {}
    for name, form in forms.items():
        program = traced(deploy(network.model, form=form), network.feed)
        batches = network.calibration
        for quantizer, engine, path in written(program, batches, folder, name):
            precision = "fp32" if quantizer == "none" else "int8"
            threads = torch.get_num_threads()
            run = engines.ENGINES[engine](str(path), precision, threads, tuned=True)
            parts = [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
            found[quantizer, engine, name] = run, sum(part.stat().st_size for part in parts)
    fed = network.feed.of(network.images).numpy()
    tasks = {key: partial(run, fed) for key, (run, _) in found.items()}
    times = measure.in_turns(tasks, ROUNDS, torch.device("cpu"), str(network.network))
    medians = {key: statistics.median(seconds) for key, seconds in times.items()}
    flops = f"1/{network.flop_ratio:.2f}"
    for quantizer, engine in dict.fromkeys(key[:2] for key in found):
        _, form = min((medians[quantizer, engine, name], name) for name in forms)
        run, size = found[quantizer, engine, form]
        top1 = exporting.accuracy(network, run, f"{quantizer}, {engine}")
        cells = [
            str(network.network),
            flops,
            quantizer,
            measure.ENGINES[engine],
            form,
            f"{top1:.2%}",
        ]
        cells += [f"{100 * (network.top1 - top1):.2f}", f"{size / 1e6:.3f}"]
        cells += [f"{1e3 * medians[quantizer, engine, form]:.1f}"]
        cells += [run.micro_batch(len(fed))]
        yield dict(zip(HEADER, cells, strict=True))


def written(
    program: Any, batches: list[torch.Tensor], folder: Path, form: str
) -> Iterator[tuple[str, str, Path]]:
    """(quantizer, engine, file): without quantization, and by both in both engines."""
    import onnx
    import openvino

    arrays = [batch.numpy() for batch in batches]
    named = [{onnx_file.INPUT: array} for array in arrays]
    (plain,) = onnx_file.write(program, folder / f"{form}-plain.onnx", "fp32", [], {})
    graph, *_ = openvino_file.write(program, folder / f"{form}-plain.xml", "fp32", [], {})
    yield "none", "onnx", plain
    yield "none", "openvino", graph
    for quantizer, quantized in (
        ("ONNX Runtime", int8.by_onnxruntime(onnx.load(plain), named)),
        ("NNCF", int8.by_nncf(onnx.load(plain), named)),
    ):
        path = folder / f"{form}-{quantizer}.onnx"
        onnx_file.compact(quantized.graph)
        onnx.save(quantized, path)
        yield quantizer, "onnx", path
        if quantizer == "ONNX Runtime":
            yield quantizer, "openvino", path
    path = folder / f"{form}-NNCF.xml"
    openvino.save_model(
        int8.by_nncf(openvino.Core().read_model(graph), arrays), path, compress_to_fp16=False
    )
    yield "NNCF", "openvino", path


if __name__ == "__main__":
    entry.run(main)
