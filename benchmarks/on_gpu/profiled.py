"""Where the time of a training step goes: its most expensive operators, by torch.profiler.

python benchmarks/on_gpu/profiled.py [--device cuda] [--network resnet-164] [--batch 64]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import measure
from benchmarks.reference import BATCH
from benchmarks.variants import Trial, make_epoch
from slimming.cli import entry
from slimming.runtime.device import choose_device
from slimming.settings import count

NETWORKS = ("vgg-19", "resnet-164", "densenet-40")
VARIANT = "amp"
STEPS, TOP = 10, 12
HEADER = ["network", "batch", "operator", "share", "ms/step", "calls/step"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: cuda if available")
    text = "may be repeated (default: the three of the paper)"
    parser.add_argument("--network", action="append", metavar="ARCH-DEPTH", help=text)
    parser.add_argument("--batch", type=count, default=BATCH, metavar="N", help="batch size")
    parser.add_argument("--quick", action="store_true", help="2 steps")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device, rows = choose_device(args.device), []
    torch.backends.cudnn.benchmark = True
    for network in args.network or NETWORKS:
        arch, _, depth = network.rpartition("-")
        steps = 2 if args.quick else STEPS
        rows += profiled(Trial(VARIANT, arch, int(depth), args.batch, steps, str(device)))
        measure.write("profile", measure.machine(device), HEADER, rows)


def profiled(trial: Trial) -> list[dict]:
    """The operators of a step that take longest, without what they call."""
    epoch = make_epoch(trial)
    epoch()
    with torch.profiler.profile() as profile:
        epoch()
    on_gpu = trial.device.startswith("cuda")

    def microseconds(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    # kernels have events of their own, which repeat the time of the operators that launch them
    operators = [e for e in profile.key_averages() if e.device_type == DeviceType.CPU]
    events = sorted(operators, key=microseconds, reverse=True)
    total = sum(map(microseconds, events)) or 1
    return [
        {
            "network": f"{trial.arch}-{trial.depth}",
            "batch": trial.batch,
            "operator": event.key[:60],
            "share": f"{microseconds(event) / total:.1%}",
            "ms/step": round(microseconds(event) / trial.steps / 1e3, 3),
            "calls/step": round(event.count / trial.steps, 1),
        }
        for event in events[:TOP]
    ]


if __name__ == "__main__":
    entry.run(main)
