"""Prune the channels of a VGG with the smallest scaling factors over the whole network.

Removing a channel also removes its filter in the convolution before the BN, and its slice of each
filter in the convolution after it.

    python vggprune.py --dataset cifar10 --depth 19 --percent 0.7 --model logs/model_best.pth.tar
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
    dense = before_after.load(run, arch="vgg")
    with dense.claimed():
        choice = allocation.choose(dense.prunable, dense.ratio, run.prune.allocation)
        slim, kept = dense.prunable.slim(choice)
        proof = prove_equal(slim, slicing.masked(dense.model, kept), dense.images)
        before_after.save_pruned(dense, slim, kept, choice, proof)


if __name__ == "__main__":
    entry.run(main)
