"""Prune by mask: set γ and β of the channels with the smallest scaling factors to zero.

The network keeps its shape, so whole layers may be pruned. Also prints the size of the equivalent
slim network.

    python mask-impl/prune_mask.py --dataset cifar100 --arch resnet --depth 164 --percent 0.4 \\
        --model logs/model_best.pth.tar
"""

import copy
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `models` of the main suite

from slimming.channels.scaling import zero_channels
from slimming.choosing.threshold import sorted_factors
from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.prune.run import load, save_pruned
from slimming.commands.prune.settings import PruningRun
from slimming.slicing.proof import prove_equal
from slimming.slicing.prune import kept_alive
from slimming.slicing.slim import sliced

NETWORKS = importlib.import_module("mask-impl.models").NETWORKS


def make_parser() -> Parser:
    return flags.make_parser(__doc__, PruningRun)


def main() -> None:
    run: PruningRun = flags.read(make_parser())
    job = load(run, arch=None, networks=NETWORKS)
    with job.claimed():
        prunable = job.find_prunable()
        ratio = job.find_ratio(prunable)  # --percent, or what a budget takes
        factors = sorted_factors(job.model)  # |γ| of the whole network
        threshold = float(factors[int(len(factors) * ratio)])
        choice = job.choose(prunable, threshold, ratio, at_least_one=False)  # whole layers may go
        masked = zero_channels(copy.deepcopy(job.model), choice.kept)
        kept = kept_alive(masked)
        slim = sliced(masked, kept)
        difference = prove_equal(slim, masked, job.images)
        save_pruned(job, slim, kept, choice, difference, masked)


if __name__ == "__main__":
    entry.run(main)
