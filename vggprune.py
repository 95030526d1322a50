"""Prune the channels of a VGG with the smallest scaling factors over the whole network.

Removing a channel also removes its filter in the convolution before the BN, and its slice of each
filter in the convolution after it.

    python vggprune.py --dataset cifar10 --depth 19 --percent 0.7 --model logs/model_best.pth.tar
"""

from slimming.choosing.threshold import sorted_factors
from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.prune.run import load, save_pruned
from slimming.commands.prune.settings import PruningRun
from slimming.settings import build
from slimming.slicing.proof import prove_equal
from slimming.slicing.slim import masked, slim_to


def make_parser() -> Parser:
    return flags.make_parser(__doc__, PruningRun)


def main() -> None:
    run = build(PruningRun, flags.parse(make_parser()))
    dense = load(run, arch="vgg")
    with dense.claimed():
        ratio = dense.find_ratio()  # --percent, or what a budget takes
        factors = sorted_factors(dense.model)  # |γ| of the whole network
        threshold = float(factors[int(len(factors) * ratio)])
        choice = dense.choose(threshold, ratio)
        slim, kept = slim_to(dense.model, dense.prunable.coupled, choice.kept)
        difference = prove_equal(slim, masked(dense.model, kept), dense.images)
        save_pruned(dense, slim, kept, choice, difference)


if __name__ == "__main__":
    entry.run(main)
