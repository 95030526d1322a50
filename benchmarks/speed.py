"""This suite's training step against the classic loop, in turns.

`reference` is the loop of the original scripts (see reference.py): PIL transforms in a DataLoader
with one worker, fp32, NCHW, a penalty loop over the modules, channel selection that finds its
indices with NumPy in every forward. The suite trains with its own loader and its own
`slimming.training.loop.train`.

    python benchmarks/speed.py [--device cuda] [--quick] [--each]
"""

import argparse
import contextlib
import functools
import io
import math
import multiprocessing
import os
import statistics
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from benchmarks.reference import BATCH, CHANGES, S, changes_of, reference_epoch, update_bn_by_loop
from models import NETWORKS
from slimming.cli import entry
from slimming.data.batches import Batches
from slimming.data.pixels import Split
from slimming.measuring import profiling
from slimming.runtime.device import choose_device, compiled
from slimming.runtime.memory import keep_freed_memory
from slimming.runtime.precision import Precision
from slimming.training import loop
from slimming.training.optimizer import make_optimizer
from slimming.training.penalties import L1Penalty

CASES = (("vgg", 19), ("resnet", 164), ("densenet", 40), ("resnet", 20))
HEADER = ["network", "variant", "images/s", "ms/step", "ratio", "penalty", "peak memory (MB)"]
HEADER += ["of matmul peak"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="fewer steps, no --compile")
    parser.add_argument("--compile", action="store_true", help="measure --compile as well")
    text = "measure each change from the reference to the suite by itself"
    parser.add_argument("--each", action="store_true", help=text)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device = choose_device(args.device)
    variants = ["reference", *(CHANGES if args.each else ()), "fp32", "amp"]
    if (args.compile or device.type == "cuda") and not args.quick:
        variants.append("amp+compile")
    peak = {dtype: matmul_peak(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    steps = (2, 3) if args.quick else (4, 7) if device.type == "cpu" else (50, 7)
    rows = []
    for arch, depth in CASES[:3] if args.each else CASES:
        rows += measure_network(arch, depth, variants, *steps, peak, device)
    about = measure.machine(device)
    for dtype, flops in peak.items():
        about[f"matmul peak, {str(dtype).removeprefix('torch.')}"] = f"{flops / 1e9:.0f} GFLOP/s"
    name = f"speed-{'each-' if args.each else ''}{device.type}{'-quick' if args.quick else ''}"
    measure.write(name, about, HEADER, rows, NOTES)


NOTES = """`ratio`: images/s by the reference's, median of the rounds. `penalty`: its share of the
step. `peak memory`: on the CPU how much the variant's process grew, on CUDA what PyTorch allocated.
`of matmul peak`: 3 x forward FLOPs a second by those of a large matrix product in the same
precision, same run; above 100 % where a convolution needs fewer products than its FLOPs count
(Winograd)."""


def measure_network(arch, depth, variants, steps, rounds, peak, device) -> list[dict]:
    """The rows of one network: every variant trains ``steps`` batches in each of the rounds.

    Each has a process of its own, so that they share no memory, and they take turns.
    """
    name = f"{arch}-{depth}"
    spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        pools = {}  # of one process each; a multiprocessing.Pool's may have no workers of their own
        for v in variants:
            setting = (v, arch, depth, steps, str(device), threads)
            pool = ProcessPoolExecutor(1, spawn, initializer=prepare, initargs=setting)
            pools[v] = stack.enter_context(pool)
        epochs = {v: lambda pool=pool: pool.submit(one_epoch).result() for v, pool in pools.items()}
        seconds = measure.in_turns(epochs, rounds, device, name)
        memory = {v: pool.submit(peak_memory).result() for v, pool in pools.items()}
    flops = 3 * BATCH * profiling.count_flops(NETWORKS[arch](depth=depth))
    median = {v: statistics.median(times) / steps for v, times in seconds.items()}
    ratios = {
        v: statistics.median(a / b for a, b in zip(seconds["reference"], times, strict=True))
        for v, times in seconds.items()
    }
    return [
        {
            "network": name,
            "variant": v,
            "images/s": round(BATCH / median[v]),
            "ms/step": round(1e3 * median[v], 1),
            "ratio": f"{ratios[v]:.2f}x",
            "penalty": f"{penalty_seconds(v, arch, depth, device) / median[v]:.2%}",
            "peak memory (MB)": memory[v],
            "of matmul peak": f"{flops / median[v] / peak[dtype_of(v)]:.0%}",
        }
        for v in variants
    ]


process = {}  # what a variant's process holds: its epoch, its memory before


def prepare(variant: str, arch: str, depth: int, steps: int, device: str, threads: int) -> None:
    """Begin a variant's process."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if variant not in ("reference", *CHANGES):
        keep_freed_memory()  # as the scripts do
    process.update(before=_resident_peak(), device=device)
    process["epoch"] = make_epoch(variant, arch, depth, steps, torch.device(device))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # it may have been killed
    os._exit(1)


def one_epoch() -> None:
    process["epoch"]()


def peak_memory() -> int | str:
    """MB that this process needed at most for its network."""
    if process["device"].startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 2**20)
    grown = _resident_peak() - process["before"]
    return "-" if math.isnan(grown) else round(grown)


def dtype_of(variant: str) -> torch.dtype:
    return torch.bfloat16 if "amp" in variant else torch.float32


def make_epoch(variant: str, arch: str, depth: int, steps: int, device: torch.device):
    """A function that trains ``steps`` batches as ``variant`` does."""
    torch.manual_seed(0)
    images = torch.randint(256, (steps * BATCH, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (steps * BATCH,))
    if variant in ("reference", *CHANGES[:-1]):
        return reference_epoch(arch, depth, images, labels, device, changes_of(variant))
    split = Split(images.to(device), labels.to(device), [""] * 10)
    loader = Batches(split, BATCH, augment=True)
    model = NETWORKS[arch](depth=depth).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, 0.01, 0.9, 1e-4)
    precision = Precision(device, amp="amp" in variant)
    penalty = [L1Penalty(model, S)]
    trained = compiled(model, device) if "compile" in variant else model

    def run():
        with contextlib.redirect_stdout(io.StringIO()):
            loop.train(trained, loader, optimizer, 0, penalty, precision, steps + 1)

    return run


def penalty_seconds(variant: str, arch: str, depth: int, device: torch.device) -> float:
    """Median seconds of one call of the penalty."""
    model = NETWORKS[arch](depth=depth).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    call = L1Penalty(model, S).on_gradients
    if variant in ("reference", *CHANGES[:2]):
        call = functools.partial(update_bn_by_loop, model)
    times = []
    for _ in range(30):
        start = measure.now(device)
        call()
        times.append(measure.now(device) - start)
    return statistics.median(times)


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = measure.now(device)
        a @ b
        best = min(best, measure.now(device) - start)
    return 2 * size**3 / best


def _resident_peak() -> float:
    """MB that this process held at most; not getrusage, which counts the parent before exec."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    entry.run(main)
