"""Slim a pre-activation ResNet: prune the channels with the smallest scaling factors.

The sum over the blocks keeps its channels; channel selection after a block's first BN passes on
only those that the block still reads. Inside a block, filters go as in a VGG.

    python resprune.py --dataset cifar10 --depth 164 --percent 0.4 --model logs/model_best.pth.tar
    python resprune.py --ckpt_dir ckpts/preact_res20_sr --arch preact_res20 --percent 0.4
"""

from slimming import before_after, cli, flags, pruning


def make_parser() -> cli.Parser:
    parser = flags.pruning_parser(__doc__)
    parser.add_argument("--ckpt_dir", dest="model", metavar="PATH", help="the same as --model")
    parser.add_argument("--save_dir", dest="save", metavar="DIR", help="the same as --save")
    return parser


def main() -> None:
    args = flags.parse_pruning(make_parser())
    dense = before_after.load(args, arch="resnet")
    choice = pruning.choose_channels(dense.model, args.percent, round_to=args.round_to)
    slim = pruning.slim(dense.model, choice.keep)
    proof = pruning.prove_equal(slim, pruning.masked(dense.model, choice.keep), dense.images)
    before_after.report(dense, slim, choice, proof)


if __name__ == "__main__":
    cli.run(main)
