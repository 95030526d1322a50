"""Slim a DenseNet: prune the channels with the smallest scaling factors of the whole network.

Every block appends its channels to those before it, so feature maps stay whole; channel selection
after each BN passes on only the channels that the next convolution still reads.

    python denseprune.py --dataset cifar10 --depth 40 --percent 0.4 --model logs/model_best.pth.tar
"""

from slimming import before_after, cli, flags, pruning


def main() -> None:
    args = flags.parse_pruning(flags.pruning_parser(__doc__))
    dense = before_after.load(args, arch="densenet")
    choice = pruning.choose_channels(dense.model, args.percent, round_to=args.round_to)
    slim = pruning.slim(dense.model, choice.keep)
    proof = pruning.prove_equal(slim, pruning.masked(dense.model, choice.keep), dense.images)
    before_after.report(dense, slim, choice, proof)


if __name__ == "__main__":
    cli.run(main)
