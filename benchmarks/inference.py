"""Measure the speed-up of pruned networks, compared to the ratio of their FLOPs.

Each network is pruned at the paper's percentage. The dense and the slim network, with and without
their deployment form, take turns on the same batch. The scaling factors are random, or those of a
run with -sr, which lead to other shapes.

    python benchmarks/inference.py [--model logs/model_best.pth.tar ...] [--device cuda] [--quick]
"""

import argparse
import functools
import itertools
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from models import NETWORKS
from slimming.cli import entry
from slimming.measuring import profiling
from slimming.measuring.deploy import deploy
from slimming.pruning import slicing
from slimming.pruning.groups import declared
from slimming.pruning.scaling import batch_norms
from slimming.pruning.threshold import choose_channels
from slimming.runtime.device import LAYOUT, choose_device
from slimming.storage import architecture, files

CASES = {"vgg": (19, 0.7), "resnet": (164, 0.4), "densenet": (40, 0.4)}
HEADER = ["network", "γ", "--round-to", "batch", "FLOP ratio"]
HEADER += ["dense ms", "dense deployed ms", "slim ms", "slim deployed ms"]
HEADER += ["speed-up", "realised", "realised before", "of deployed dense"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: cuda if available")
    text = "checkpoint of a run with -sr, to prune in addition to networks with random factors"
    parser.add_argument("--model", type=Path, action="append", default=[], help=text)
    parser.add_argument("--quick", action="store_true", help="run fewer rounds")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device = choose_device(args.device)
    rows = []
    networks = [(arch, "random", random_network(arch)) for arch in CASES]
    for path in args.model:
        model, network, _ = architecture.load(files.find(path, "model_best.pth.tar"))
        networks.append((network.arch, "trained", model))
    for (arch, factors, dense), multiple in itertools.product(networks, (1, 16)):
        ratio = CASES[arch][1]
        keep = choose_channels(dense, ratio, round_to=multiple).keep
        slim = slicing.sliced(dense, slicing.kept_channels(dense, declared(dense), keep))
        title = {"network": f"{arch}-{dense.depth} at {ratio:.0%}", "γ": factors}
        title["--round-to"] = multiple
        for batch in (64, 1):
            rounds = (3 if args.quick else 15) * (1 if batch > 1 else 4)
            seconds = latencies(dense.to(device), slim.to(device), batch, rounds, device)
            rows.append({**title, "batch": batch, **row(dense, slim, seconds)})
    name = f"inference-{device.type}{'-quick' if args.quick else ''}"
    measure.write(name, measure.machine(device), HEADER, rows, NOTES)


NOTES = """`speed-up` is dense / slim deployed, `realised` that speed-up / the FLOP ratio; `realised
before` is the same for the slim network without deployment. `of deployed dense` is based on the
time of the deployed dense network instead: the effect of pruning only."""


def random_network(arch: str) -> nn.Module:
    """A network of the paper's depth with random scaling factors."""
    torch.manual_seed(0)
    dense = NETWORKS[arch](depth=CASES[arch][0]).eval()
    for bn in batch_norms(dense).values():
        bn.weight.data.uniform_(0, 1)
        bn.bias.data.normal_(0, 0.1)
    return dense


@torch.no_grad()
def latencies(
    dense: nn.Module, slim: nn.Module, batch: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of a forward pass of each form."""
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=LAYOUT)
    forms = {"dense": dense, "dense deployed": deploy(dense), "slim": slim}
    forms["slim deployed"] = deploy(slim)
    tasks = {}
    for name, form in forms.items():
        form.to(memory_format=LAYOUT)
        tasks[name] = functools.partial(form, images)
    seconds = measure.in_turns(tasks, rounds, device, f"batch {batch}")
    return {name: statistics.median(times) for name, times in seconds.items()}


def row(dense: nn.Module, slim: nn.Module, seconds: dict[str, float]) -> dict:
    """The figures of one row of the table."""
    flops = profiling.count_flops(dense) / profiling.count_flops(slim)
    speed_up = seconds["dense"] / seconds["slim deployed"]
    return {
        "FLOP ratio": round(flops, 2),
        **{f"{form} ms": round(1e3 * s, 1) for form, s in seconds.items()},
        "speed-up": round(speed_up, 2),
        "realised": round(speed_up / flops, 2),
        "realised before": round(seconds["dense"] / seconds["slim"] / flops, 2),
        "of deployed dense": round(seconds["dense deployed"] / seconds["slim deployed"] / flops, 2),
    }


if __name__ == "__main__":
    entry.run(main)
