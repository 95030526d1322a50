"""The paper's workflow with as many epochs as there is time for: sparsity training, pruning,
repair, fine-tuning.

    python benchmarks/on_gpu/accuracy.py --seconds 600 --data DIR [--device cuda]
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import measure, reproduce
from benchmarks.variants import Trial, make_epoch
from slimming.cli import entry
from slimming.data import image_folder
from slimming.measuring import figures
from slimming.runtime.device import choose_device
from slimming.storage import architecture, checkpoint, files

BATCH = 256  # of the paper's 64, a GPU would wait for the CPU
LR = 0.05  # of fine-tuning
MOST = 30  # epochs of each training; if more time is left, more seeds
START = 12.0  # seconds of each of the three commands without its epochs
SLACK = 1.2  # of an epoch: evaluation, checkpoints
SMALLEST = {"resnet": 11}  # for a dry run
HEADER = ["network", "seed", "epochs", "sparsity", "pruned", "repaired", "fine-tuned"]
HEADER += ["parameters", "MFLOPs"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="image folder")
    parser.add_argument("--seconds", type=float, required=True, help="time for everything")
    parser.add_argument("--work", type=Path, default=Path("reproduce"), help="folder of the runs")
    parser.add_argument("--device", help="default: cuda if available")
    parser.add_argument("--quick", action="store_true", help="one small network, one epoch")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    deadline, device = time.monotonic() + args.seconds, choose_device(args.device)
    torch.backends.cudnn.benchmark = True
    depths = SMALLEST if args.quick else {a: case[1] for a, case in reproduce.CASES.items()}
    args.amp, args.epochs = True, 1 if args.quick else choose_epochs(depths, args)
    about, seed, took = measure.machine(device), 0, 0.0
    while not seed or (time.monotonic() + took < deadline and not args.quick):
        seed, began = seed + 1, time.monotonic()
        for arch, depth in depths.items():
            rows = measure.merged("accuracy", [workflow(arch, depth, seed, args)], HEADER[:3])
            measure.write("accuracy", about, HEADER, rows)
        took = time.monotonic() - began
        _plan(args).unlink(missing_ok=True)  # this many epochs are done: next time, choose again


def choose_epochs(depths: dict[str, int], args: argparse.Namespace) -> int:
    """The number of epochs for which there is time, from 1 to `MOST`; that of a call that was
    interrupted, if there was one."""
    if _plan(args).exists():
        return int(_plan(args).read_text())
    count = len(image_folder.scan_folder(args.data, "train")[1])
    seconds = sum(seconds_of_step(arch, depth, args) for arch, depth in depths.items())
    left = args.seconds - 3 * START * len(depths)
    epochs = int(left / (2 * SLACK * seconds * max(1, count / BATCH)))
    epochs = max(1, min(epochs, MOST))
    files.write_bytes(_plan(args), str(epochs).encode())
    print(f"there is time for {epochs} epochs of each training", flush=True)
    return epochs


def seconds_of_step(arch: str, depth: int, args: argparse.Namespace) -> float:
    """Seconds of a training step."""
    steps = 10
    epoch = make_epoch(Trial("amp", arch, depth, BATCH, steps, args.device or "cuda"))
    epoch()
    began = time.perf_counter()
    epoch()
    return (time.perf_counter() - began) / steps


def workflow(arch: str, depth: int, seed: int, args: argparse.Namespace) -> dict:
    """Run what is missing of the workflow of one network, and return its row of the table."""
    script, _, s, ratios = reproduce.CASES[arch]
    folder = args.work / f"accuracy-{args.data.name}-{args.epochs}-{seed}" / arch
    data = ["--dataset", "folder", "--data", args.data]
    data += ["--device", args.device] if args.device else []
    train = ["--seed", seed, "--batch-size", min(BATCH, 16) if args.quick else BATCH]
    train += ["--no-tensorboard"]
    network = ["-sr", "--s", s, "--arch", arch, "--depth", depth]
    sparse = reproduce.train(folder / "sparse", [*network, *train], data, args)
    pruned = folder / "pruned.pth.tar"
    if not pruned.exists():
        chosen = ["--percent", ratios[0], "--model", sparse, "--save", folder]
        images = ["--repair-images", 32] if args.quick else []
        reproduce.run(script, *data, *chosen, "--repair", *images)
    words = ["--refine", pruned, "--lr", LR, *train]
    tuned = reproduce.train(folder / "tuned", words, data, args)
    stages = checkpoint.read(pruned)["repair"]
    scores = [stages[name]["prec1"] for name in ("dense", "pruned", "repaired")]
    scores.append(checkpoint.read(tuned)["best_prec1"])
    models = [architecture.load(path)[0] for path in (sparse, tuned)]
    sizes = [f"{figures.count_parameters(model):,}" for model in models]
    costs = [f"{figures.count_flops(model) / 1e6:.1f}" for model in models]
    name = f"{arch}-{depth} at {ratios[0]:.0%}"
    values = [name, seed, args.epochs, *(f"{score:.2%}" for score in scores)]
    return dict(zip(HEADER, [*values, " -> ".join(sizes), " -> ".join(costs)], strict=True))


def _plan(args: argparse.Namespace) -> Path:
    """The file that holds the number of epochs until all networks are trained."""
    return args.work / "epochs"


if __name__ == "__main__":
    entry.run(main)
