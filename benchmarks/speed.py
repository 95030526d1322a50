"""Compare the speed of this suite's training step to the original loop.

`reference` is the loop of the original scripts (see reference.py): PIL transforms in a DataLoader
with one worker, fp32, NCHW, a penalty loop over the modules, channel selection that computes its
indices with NumPy in every forward. The suite trains with its own loader and
`slimming.training.loop.train`.

    python benchmarks/speed.py [--device cuda] [--quick] [--each] [--network vgg-19] [--batch 256]
"""

import argparse
import contextlib
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure, variants
from benchmarks.reference import BATCH, CHANGES
from benchmarks.variants import REFERENCE, Trial, number_format
from models import NETWORKS
from slimming.cli import entry
from slimming.measuring import figures
from slimming.runtime.device import choose_device
from slimming.settings import count

CASES = ("vgg-19", "resnet-164", "densenet-40", "resnet-20")
OWN = ("fp32", "tf32", "amp", "amp+compile")  # this suite
IMAGES = 3200  # of a round on CUDA, at least; at batch size 64, 50 steps
HEADER = ["network", "batch", "variant", "images/s", "ms/step", "ratio", "penalty"]
HEADER += ["peak memory (MB)", "launches/step", "of matmul peak"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: cuda if available")
    parser.add_argument("--quick", action="store_true", help="2 steps, 1 round")
    text = "may be repeated (default: all of the table)"
    parser.add_argument("--network", action="append", metavar="ARCH-DEPTH", help=text)
    text = f"batch size; may be repeated (default: {BATCH})"
    parser.add_argument("--batch", action="append", type=count, metavar="N", help=text)
    parser.add_argument("--compile", action="store_true", help="also measure --compile")
    text = "measure the reference and this variant alone; may be repeated"
    parser.add_argument("--variant", action="append", choices=OWN, help=text)
    text = "measure each change from the reference to the suite separately"
    parser.add_argument("--each", action="store_true", help=text)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device = choose_device(args.device)
    names = args.variant or variants_of(device, args.each, args.compile)
    names = [REFERENCE, *names]
    size = 512 if args.quick else 2048 if device.type == "cpu" else 8192
    peak = {f: variants.matmul_peak(f, device, size) for f in map(number_format, names)}
    about = measure.machine(device)
    about |= {f"matmul peak, {f}": f"{flops / 1e9:.0f} GFLOP/s" for f, flops in peak.items()}
    name = f"speed-{'each-' if args.each else ''}{device.type}{'-quick' if args.quick else ''}"
    rows = []
    for network in args.network or CASES[: 3 if args.each else None]:
        arch, _, depth = network.rpartition("-")
        for batch in args.batch or [BATCH]:
            steps, rounds = plan(device, batch, args.quick)
            trials = [Trial(v, arch, int(depth), batch, steps, str(device)) for v in names]
            rows += measure_trials(trials, rounds, peak)
            measure.write(name, about, HEADER, rows, NOTES)


NOTES = """`ratio`: images/s divided by that of the reference, median of the rounds. `penalty`: its
fraction of the step. `peak memory`: on the CPU the growth of the variant's process, on CUDA the
memory that PyTorch allocated. `launches`: of kernels and CUDA graphs. `of matmul peak`: 3 x forward
FLOP/s, divided by the FLOP/s of a large matrix product with the same precision in the same run;
above 100 % if a convolution needs fewer multiplications than its FLOPs count (Winograd). On CUDA,
the reference uses PyTorch's default: TF32 in convolutions, and fp32 in matrix products."""


def variants_of(device: torch.device, each: bool, compiles: bool) -> list[str]:
    """The variants to compare with the reference on ``device``."""
    skipped = ["tf32"] if device.type == "cpu" else []
    skipped += [] if compiles else ["amp+compile"]
    return [*(CHANGES if each else ()), *(v for v in OWN if v not in skipped)]


def plan(device: torch.device, batch: int, quick: bool) -> tuple[int, int]:
    """Steps in a round, and rounds."""
    if quick:
        return 2, 1
    return (4, 7) if device.type == "cpu" else (max(8, IMAGES // batch), 5)


def measure_trials(trials: list[Trial], rounds: int, peak: dict[str, float]) -> list[dict]:
    """The rows of one network at one batch size.

    The variants take turns, and each has its own process, so that they share no memory.
    """
    device = torch.device(trials[0].device)
    started = multiprocessing.get_context("forkserver")  # it has imported PyTorch, not used CUDA
    started.set_forkserver_preload(["torch", "torchvision"])
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        pools = {}  # not multiprocessing.Pool, whose processes cannot start DataLoader workers
        for trial in trials:
            told = trial, threads
            pool = ProcessPoolExecutor(1, started, initializer=variants.prepare, initargs=told)
            pools[trial] = stack.enter_context(pool)
        for is_ready in [pool.submit(variants.ready) for pool in pools.values()]:
            is_ready.result()  # they get ready at the same time
        epochs = {
            trial.variant: lambda pool=pool: pool.submit(variants.one_epoch).result()
            for trial, pool in pools.items()
        }
        title = f"{trials[0].arch}-{trials[0].depth}, batch size {trials[0].batch}"
        seconds = measure.in_turns(epochs, rounds, device, title)
        memory = {t: pool.submit(variants.peak_memory).result() for t, pool in pools.items()}
        calls = {t: pool.submit(variants.launches).result() for t, pool in pools.items()}
    more = [{"peak memory (MB)": memory[t], "launches/step": calls[t]} for t in trials]
    return [row(t, seconds, peak) | own for t, own in zip(trials, more, strict=True)]


def row(trial: Trial, seconds: dict[str, list[float]], peak: dict[str, float]) -> dict:
    """The times of one variant: its ``seconds`` in each round, and those of the others."""
    own = seconds[trial.variant]
    step = statistics.median(own) / trial.steps
    ratios = (a / b for a, b in zip(seconds[REFERENCE], own, strict=True))
    network = NETWORKS[trial.arch](depth=trial.depth)
    flops = 3 * trial.batch * figures.count_flops(network)
    return {
        "network": f"{trial.arch}-{trial.depth}",
        "batch": trial.batch,
        "variant": trial.variant,
        "images/s": round(trial.batch / step),
        "ms/step": round(1e3 * step, 1),
        "ratio": f"{statistics.median(ratios):.2f}x",
        "penalty": f"{variants.penalty_seconds(trial) / step:.2%}",
        "of matmul peak": f"{flops / step / peak[number_format(trial.variant)]:.0%}",
    }


if __name__ == "__main__":
    entry.run(main)
