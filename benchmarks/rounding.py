"""Measure slim networks whose layers keep multiples of channels: 1, 8, 16, and --round-to auto.

Each network has random scaling factors and is pruned at the paper's percentage. The deployment
forms of all its slim networks take turns on the same batch.

    python benchmarks/rounding.py [--device cuda] [--batch 64] [--quick]
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from benchmarks.inference import CASES, random_network, slim_of
from slimming.channels.groups import declared
from slimming.choosing.threshold import choose_channels
from slimming.cli import entry
from slimming.commands import pruning
from slimming.commands.pruning import BudgetSettings
from slimming.deploy.fold import deploy
from slimming.measuring import figures
from slimming.runtime.device import LAYOUT, choose_device

FIXED = (1, 8, 16)
HEADER = ["network", "--round-to", "batch", "channels", "MFLOPs", "FLOP ratio"]
HEADER += ["slim deployed ms", "of --round-to 1", "seconds to measure"]
NOTES = """`channels` are those that the slim network keeps, `FLOP ratio` is dense / slim, `of
--round-to 1` the time / that of the network without rounding. `seconds to measure` is what
`--round-to auto` takes to find the multiples."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: cuda if available")
    parser.add_argument("--batch", type=int, default=64, help="number of images (default: 64)")
    parser.add_argument("--quick", action="store_true", help="run fewer rounds")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device, rows = choose_device(args.device), []
    for arch, (_, ratio) in CASES.items():
        dense = random_network(arch)
        choose = functools.partial(choose_channels, dense, ratio, True)  # then round_to
        image = torch.zeros(1, 3, 32, 32, device=device)
        start = time.perf_counter()
        budgets = BudgetSettings(latency_batch=args.batch)
        found = pruning.measured(dense, declared(dense), choose, image, budgets)
        took = time.perf_counter() - start
        choices = {**{str(m): choose(m) for m in FIXED}, pruning.AUTO: choose(found)}
        slims = {name: slim_of(dense, choice) for name, choice in choices.items()}
        seconds = latencies(slims, args.batch, 5 if args.quick else 31, device)
        for name, slim in slims.items():
            flops = figures.count_flops(slim)
            rows.append(
                {
                    "network": f"{arch}-{dense.depth} at {ratio:.0%}",
                    "--round-to": name,
                    "batch": args.batch,
                    "channels": choices[name].channels[1],
                    "MFLOPs": round(flops / 1e6, 1),
                    "FLOP ratio": round(figures.count_flops(dense) / flops, 2),
                    "slim deployed ms": round(1e3 * seconds[name], 1),
                    "of --round-to 1": round(seconds[name] / seconds["1"], 3),
                    "seconds to measure": round(took, 1) if name == pruning.AUTO else "",
                }
            )
    name = f"rounding-{device.type}{'-quick' if args.quick else ''}"
    measure.write(name, measure.machine(device), HEADER, rows, NOTES)


@torch.no_grad()
def latencies(
    slims: dict[str, nn.Module], batch: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of a forward pass of each deployment form, in turns."""
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=LAYOUT)
    forms = {name: deploy(slim.to(device)) for name, slim in slims.items()}
    tasks = {name: functools.partial(form, images) for name, form in forms.items()}
    seconds = measure.in_turns(tasks, rounds, device, f"batch {batch}")
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    entry.run(main)
