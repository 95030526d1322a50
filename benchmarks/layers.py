"""Where the time of inference goes: each kind of layer in OpenVINO, dense and slim.

Networks as in inference.py. FLOPs are those that the deployment form computes: zero weights count.

    python benchmarks/layers.py [--network resnet] [--precision bf16] [--batch 16]
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from benchmarks.inference import CASES, flops, pruned, random_network
from slimming.choosing.importance import layers
from slimming.cli import entry
from slimming.deploy.engines import HINTS
from slimming.deploy.fold import deploy, forms_of
from slimming.deploy.formats import FORMATS
from slimming.deploy.graph import Feed, traced
from slimming.measuring import figures as measuring_figures
from slimming.runtime import optional

ROUNDS = 15
ALL = "all"
HEADER = ["network", "batch", "precision", "layers", "dense GFLOP/s", "slim GFLOP/s"]
HEADER += ["dense ms", "slim ms", "FLOP ratio", "speed-up"]
NOTES = """Sums of the medians of each layer, as OpenVINO measures them, one stream. `FLOP ratio`:
computed FLOPs, dense / slim; in the last line those of the slim network, without zero weights."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=CASES, action="append", help="default: all")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), action="append", help="default: both"
    )
    parser.add_argument("--batch", type=int, default=16, help="number of images (default: 16)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    optional.need("openvino", "openvino", "benchmarks/layers.py")
    rows = []
    for arch in args.network or CASES:
        dense = random_network(arch)
        slim, title = pruned(dense, CASES[arch][1]), f"{arch}-{dense.depth} at {CASES[arch][1]:.0%}"
        for precision in args.precision or ("fp32", "bf16"):
            figures = [profile(m, precision, args.batch) for m in (dense, slim)]
            for cells in compared(*figures, flops(dense, slim)):
                cells = [title, args.batch, precision, *cells]
                rows.append(dict(zip(HEADER, cells, strict=True)))
    rows = measure.merged("layers-cpu", rows, HEADER[:3])
    measure.write("layers-cpu", measure.machine(torch.device("cpu")), HEADER, rows, NOTES)


def profile(model: nn.Module, precision: str, batch: int) -> tuple[Counter, Counter]:
    """FLOPs and seconds of each kind of layer."""
    forms = forms_of(model)
    name = next(name for name in ("zeros-clamp", "clamp", "folded") if name in forms)
    deployed = deploy(model, form=forms[name])
    kinds = {name: _kind_of(layer) for name, layer in layers(deployed).items()}
    work: Counter = Counter()
    for name, count in measuring_figures.flops_of_layers(deployed).items():
        work[kinds[name]] += count * batch
    return work, seconds(deployed, precision, batch)


def seconds(deployed: nn.Module, precision: str, batch: int) -> Counter:
    """Seconds of each kind of layer: the medians of its layers."""
    import openvino

    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        program = traced(deployed, Feed(batch=batch))
        path, _ = FORMATS["openvino"].write(program, Path(folder, "net.xml"), "fp32", [], {})
        settings = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": HINTS[precision]}
        settings |= {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        request = core.compile_model(str(path), "CPU", settings).create_infer_request()
    images = np.random.default_rng(0).standard_normal((batch, 3, 32, 32), dtype=np.float32)
    taken: dict[str, list[float]] = {}
    kinds = {}
    for turn in range(ROUNDS + 1):
        request.infer([images])
        for node in request.profiling_info if turn else []:
            kinds[node.node_name] = _kind_of_node(node)
            taken.setdefault(node.node_name, []).append(node.real_time.total_seconds())
    total: Counter = Counter()
    for name, times in taken.items():
        total[kinds[name]] += float(np.median(times))
    return total


def compared(
    dense: tuple[Counter, Counter], slim: tuple[Counter, Counter], ratio: float
) -> Iterator[list]:
    """The figures of each kind of layer, and of all."""
    for kind in [*sorted(dense[1] | slim[1]), ALL]:
        pair = [
            [sum(part.values()) if kind == ALL else part[kind] for part in both]
            for both in (dense, slim)
        ]
        (work, time), (less_work, less_time) = pair
        speeds = [f"{w / t / 1e9:.0f}" if w and t else "" for w, t in pair]
        ratios = f"{ratio if kind == ALL else work / less_work:.2f}" if less_work else ""
        times = [f"{1e3 * time:.2f}", f"{1e3 * less_time:.2f}"]
        yield [kind, *speeds, *times, ratios, f"{time / less_time:.2f}" if less_time else ""]


def _kind_of(layer: nn.Module) -> str:
    if isinstance(layer, nn.Conv2d):
        return f"{layer.kernel_size[0]}x{layer.kernel_size[1]} convolutions"
    return "linear"


def _kind_of_node(node: Any) -> str:
    """The same of what OpenVINO reports."""
    if node.node_type == "Convolution":
        return f"{'1x1' if '1x1' in node.exec_type else '3x3'} convolutions"
    return "linear" if node.node_type == "FullyConnected" else "BN, ReLU, sums, copies"


if __name__ == "__main__":
    entry.run(main)
