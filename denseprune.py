"""Prune the channels of a DenseNet with the smallest scaling factors over the whole network.

Every block appends its channels to those before it, so feature maps keep their width; channel
selection after each BN keeps only the channels that the next convolution still reads.

    python denseprune.py --dataset cifar10 --depth 40 --percent 0.4 --model logs/model_best.pth.tar
"""

from slimming.choosing.threshold import sorted_factors
from slimming.cli import entry, flags
from slimming.cli.flags import Parser
from slimming.commands.prune.run import load, save_pruned
from slimming.commands.prune.settings import PruningRun
from slimming.slicing.proof import prove_equal
from slimming.slicing.slim import masked, slim_to


def make_parser() -> Parser:
    return flags.make_parser(__doc__, PruningRun)


def main() -> None:
    run: PruningRun = flags.read(make_parser())
    job = load(run, arch="densenet")
    with job.claimed():
        prunable = job.find_prunable()
        ratio = job.find_ratio(prunable)  # --percent, or what a budget takes
        factors = sorted_factors(job.model)  # |γ| of the whole network
        threshold = float(factors[int(len(factors) * ratio)])
        choice = job.choose(prunable, threshold, ratio)
        slim, kept = slim_to(job.model, prunable.coupled, choice.kept)
        difference = prove_equal(slim, masked(job.model, kept), job.images)
        save_pruned(job, slim, kept, choice, difference)


if __name__ == "__main__":
    entry.run(main)
