"""Prune the channels of a DenseNet with the smallest scaling factors over the whole network.

Every block appends its channels to those before it, so feature maps keep their width; channel
selection after each BN keeps only the channels that the next convolution still reads.

    python denseprune.py --dataset cifar10 --depth 40 --percent 0.4 --model logs/model_best.pth.tar
"""

from slimming.cli import entry, flags
from slimming.cli.parser import Parser
from slimming.pruning import allocation, slicing
from slimming.pruning.slicing.proof import prove_equal
from slimming.settings import build
from slimming.workflows import before_after
from slimming.workflows.settings import PruningRun


def make_parser() -> Parser:
    return flags.make_parser(__doc__, PruningRun)


def main() -> None:
    run = build(PruningRun, flags.parse(make_parser()))
    dense = before_after.load(run, arch="densenet")
    with dense.claimed():
        choice = allocation.choose(dense.prunable, dense.ratio, run.prune.allocation)
        slim, kept = dense.prunable.slim(choice)
        proof = prove_equal(slim, slicing.masked(dense.model, kept), dense.images)
        before_after.save_pruned(dense, slim, kept, choice, proof)


if __name__ == "__main__":
    entry.run(main)
