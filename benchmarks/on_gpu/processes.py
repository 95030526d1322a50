"""Two processes that train one network, compared with one: on one GPU by gloo; where there are two
GPUs, by NCCL, also with --sync-bn.

    python benchmarks/on_gpu/processes.py --data DIR [--device cuda]
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import measure
from slimming.cli import entry
from slimming.errors import UserError
from slimming.runtime.device import choose_device
from slimming.storage import checkpoint

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=2 --"
HEADER = ["processes", "by", "--sync-bn", "images/s", "training loss", "top-1"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="image folder")
    parser.add_argument("--work", type=Path, default=Path("reproduce"), help="folder of the runs")
    parser.add_argument("--device", help="default: cuda if available")
    parser.add_argument("--quick", action="store_true", help="train a small network with two alone")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device = choose_device(args.device)
    nccl = device.type == "cuda" and torch.cuda.device_count() > 1
    if not args.quick:
        identical(device)
    backend = "nccl" if nccl else "gloo"
    cases = [] if args.quick else [(1, "-", False)]
    cases += [(2, backend, synchronized) for synchronized in (False, True)[: 1 + nccl]]
    rows = []
    for case in cases:
        rows.append(dict(zip(HEADER, [*case, *train(*case[::2], args)], strict=True)))
        measure.write("processes", measure.machine(device), HEADER, rows)


def identical(device: torch.device) -> None:
    """Two processes end with the same weights, and their gradient is that of the whole batch."""
    printed = run(f"{TORCHRUN} tests/two_processes.py {device.type}")
    if printed.count("identical") != 1:
        raise UserError("two processes did not end with the same weights")


def train(count: int, synchronized: bool, args: argparse.Namespace) -> tuple[str, str, str]:
    """Images/s, loss and top-1 of one epoch with ``count`` processes."""
    folder = args.work / f"processes-{count}{'-sync' if synchronized else ''}"
    shutil.rmtree(folder, ignore_errors=True)
    depth = 11 if args.quick else 20
    words = (
        f"main.py -sr --sparsity 1e-4 --dataset folder --arch resnet --depth {depth} --epochs 1 "
    )
    words += shlex.join(["--no-tensorboard", "--data", str(args.data), "--save", str(folder)])
    words += f" --device {args.device}" if args.device else ""
    words += " --sync-bn" if synchronized else ""
    printed = run(f"{TORCHRUN} {words}" if count > 1 else words)
    speeds = re.findall(r"(\d+) images/s", printed)
    (epoch,) = checkpoint.read(folder / "checkpoint.pth.tar")["history"]
    return speeds[-1], f"{epoch['train_loss']:.4f}", f"{epoch['test_prec1']:.2%}"


def run(command: str) -> str:
    """What ``python command`` prints; UserError with its last line if it fails."""
    print(f"$ python {command}", flush=True)
    words, env = [sys.executable, *shlex.split(command)], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise UserError(f"python {command} failed with status {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    entry.run(main)
