"""How much of the speed-up that the FLOPs promise a pruned network reaches.

Each network with random scaling factors is pruned at the paper's percentage; dense and slim
network, as they are and in their deployment form, take turns on the same batch.

    python benchmarks/inference.py [--device cuda] [--quick]
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from models import NETWORKS
from slimming import profiling, pruning, training
from slimming.deploy import deploy
from slimming.memory import keep_freed_memory
from slimming.sparsity import batch_norms

CASES = (("vgg", 19, 0.7), ("resnet", 164, 0.4), ("densenet", 40, 0.4))
HEADER = ["network", "batch", "FLOP ratio", "dense ms", "dense deployed ms", "slim ms"]
HEADER += ["slim deployed ms", "speed-up", "realised", "realised before", "of deployed dense"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    args = parser.parse_args()
    device = torch.device(args.device)
    keep_freed_memory()  # as the scripts do
    rows = []
    for arch, depth, percent in CASES:
        dense, slim = networks(arch, depth, percent, device)
        for batch in (64, 1):
            rounds = (3 if args.quick else 15) * (1 if batch > 1 else 4)
            seconds = latencies(dense, slim, batch, rounds, device)
            rows.append(row(f"{arch}-{depth} at {percent:.0%}", batch, dense, slim, seconds))
    measure.write(f"inference-{device.type}", measure.machine(device), HEADER, rows, NOTES)


NOTES = """`speed-up` is dense / slim deployed, `realised` that speed-up / the FLOP ratio; `realised
before` is the same for the slim network as it is. `of deployed dense` divides the deployed dense
network's time instead: what pruning alone brings."""


def networks(arch: str, depth: int, percent: float, device: torch.device):
    """A dense network with random scaling factors and the slim one that pruning leaves."""
    torch.manual_seed(0)
    dense = NETWORKS[arch](depth=depth).eval()
    for bn in batch_norms(dense).values():
        bn.weight.data.uniform_(0, 1)
        bn.bias.data.normal_(0, 0.1)
    slim = pruning.slim(dense, pruning.choose_channels(dense, percent).keep)
    return dense.to(device), slim.to(device)


@torch.no_grad()
def latencies(dense, slim, batch: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a forward pass of each form."""
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=training.LAYOUT)
    forms = {"dense": dense, "dense deployed": deploy(dense), "slim": slim}
    forms["slim deployed"] = deploy(slim)
    tasks = {}
    for name, form in forms.items():
        form.to(memory_format=training.LAYOUT)
        tasks[name] = functools.partial(form, images)
    seconds = measure.in_turns(tasks, rounds, device, f"batch {batch}")
    return {name: statistics.median(times) for name, times in seconds.items()}


def row(name: str, batch: int, dense, slim, seconds: dict[str, float]) -> dict:
    """One line of the table."""
    flops = profiling.count_flops(dense) / profiling.count_flops(slim)
    speed_up = seconds["dense"] / seconds["slim deployed"]
    return {
        "network": name,
        "batch": batch,
        "FLOP ratio": round(flops, 2),
        **{f"{form} ms": round(1e3 * s, 1) for form, s in seconds.items()},
        "speed-up": round(speed_up, 2),
        "realised": round(speed_up / flops, 2),
        "realised before": round(seconds["dense"] / seconds["slim"] / flops, 2),
        "of deployed dense": round(seconds["dense deployed"] / seconds["slim deployed"] / flops, 2),
    }


if __name__ == "__main__":
    main()
