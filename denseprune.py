"""Prune the channels of a DenseNet with the smallest scaling factors over the whole network.

Every block appends its channels to those before it, so feature maps keep their width; channel
selection after each BN keeps only the channels that the next convolution still reads.

    python denseprune.py --dataset cifar10 --depth 40 --percent 0.4 --model logs/model_best.pth.tar
"""

from slimming import slicing
from slimming.choosing import allocation
from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.prune import run as prune_run
from slimming.commands.prune.settings import PruningRun
from slimming.settings import build
from slimming.slicing.proof import prove_equal


def make_parser() -> Parser:
    return flags.make_parser(__doc__, PruningRun)


def main() -> None:
    run = build(PruningRun, flags.parse(make_parser()))
    dense = prune_run.load(run, arch="densenet")
    with dense.claimed():
        choice = allocation.choose(dense.prunable, dense.ratio, run.prune.allocation)
        slim, kept = slicing.slim_to(dense.model, dense.prunable.coupled, choice.keep)
        proof = prove_equal(slim, slicing.masked(dense.model, kept), dense.images)
        prune_run.save_pruned(dense, slim, kept, choice, proof)


if __name__ == "__main__":
    entry.run(main)
