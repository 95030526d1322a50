"""Prune by mask: set γ and β of the channels with the smallest scaling factors to zero.

The network keeps its shape, so whole layers may go. The size of the slim network that the mask
stands for is printed too.

    python mask-impl/prune_mask.py --dataset cifar100 --arch resnet --depth 164 --percent 0.4 \\
        --model logs/model_best.pth.tar
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `models` is the suite's

from slimming.cli import entry, flags
from slimming.pruning import wired
from slimming.pruning.proof import prove_equal
from slimming.pruning.threshold import choose_channels, keep_one
from slimming.workflows import before_after

NETWORKS = importlib.import_module("mask-impl.models").NETWORKS


def main() -> None:
    args = flags.parse_pruning(flags.pruning_parser(__doc__))
    dense = before_after.load(args, arch=None, networks=NETWORKS)
    choice = choose_channels(dense.model, args.percent, at_least_one=False, round_to=args.round_to)
    masked = wired.masked(dense.model, choice.keep)
    slim = wired.slim(masked, keep_one(masked, choice.keep))
    proof = prove_equal(slim, masked, dense.images)
    before_after.report(dense, slim, choice, proof, masked)


if __name__ == "__main__":
    entry.run(main)
