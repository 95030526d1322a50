"""Compare the speed of this suite's training step to the original loop.

`reference` is the loop of the original scripts (see reference.py): PIL transforms in a DataLoader
with one worker, fp32, NCHW, a penalty loop over the modules, channel selection that computes its
indices with NumPy in every forward. The suite trains with its own loader and
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
from collections.abc import Callable
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
    parser.add_argument("--device", help="default: cuda if available")
    parser.add_argument("--quick", action="store_true", help="run fewer steps, no --compile")
    parser.add_argument("--compile", action="store_true", help="also measure --compile")
    text = "measure each change from the reference to the suite separately"
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


NOTES = """`ratio`: images/s divided by that of the reference, median of the rounds. `penalty`: its
fraction of the step. `peak memory`: on the CPU the growth of the variant's process, on CUDA the
memory that PyTorch allocated. `of matmul peak`: 3 x forward FLOP/s, divided by the FLOP/s of a
large matrix product with the same precision in the same run; above 100 % if a convolution needs
fewer multiplications than its FLOPs count (Winograd)."""


def measure_network(
    arch: str,
    depth: int,
    variants: list[str],
    steps: int,
    rounds: int,
    peak: dict[torch.dtype, float],
    device: torch.device,
) -> list[dict]:
    """The rows of one network: every variant trains ``steps`` batches in each round.

    The variants take turns, and each has its own process, so that they share no memory.
    """
    name = f"{arch}-{depth}"
    spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        pools = {}  # not multiprocessing.Pool, whose processes cannot start DataLoader workers
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


process = {}  # the state of a variant's process: its epoch function, its initial memory


def prepare(variant: str, arch: str, depth: int, steps: int, device: str, threads: int) -> None:
    """Initialize the process of a variant."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if variant not in ("reference", *CHANGES):
        keep_freed_memory()  # like the scripts
    process.update(before=_resident_peak(), device=device)
    process["epoch"] = make_epoch(variant, arch, depth, steps, torch.device(device))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns even if the parent was killed
    os._exit(1)


def one_epoch() -> None:
    process["epoch"]()


def peak_memory() -> int | str:
    """The peak memory of this process for its network, in MB."""
    if process["device"].startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 2**20)
    grown = _resident_peak() - process["before"]
    return "-" if math.isnan(grown) else round(grown)


def dtype_of(variant: str) -> torch.dtype:
    return torch.bfloat16 if "amp" in variant else torch.float32


def make_epoch(
    variant: str, arch: str, depth: int, steps: int, device: torch.device
) -> Callable[[], None]:
    """A function that trains ``steps`` batches with ``variant``."""
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

    def run() -> None:
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
    """FLOP/s of a large matrix product, the best of several runs."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = measure.now(device)
        a @ b
        best = min(best, measure.now(device) - start)
    return 2 * size**3 / best


def _resident_peak() -> float:
    """The peak memory of this process in MB; getrusage would include the parent before exec."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    entry.run(main)
