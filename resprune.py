"""Slim a pre-activation ResNet: prune the channels with the smallest scaling factors.

The sum over the blocks keeps its channels; channel selection after a block's first BN passes on
only those that the block still reads. Inside a block, filters go as in a VGG.

    python resprune.py --dataset cifar10 --depth 164 --percent 0.4 --model logs/model_best.pth.tar
    python resprune.py --ckpt_dir ckpts/preact_res20_sr/best_acc --arch preact_res20
"""

import argparse
from pathlib import Path

from slimming.cli import entry, flags
from slimming.cli.parser import Parser
from slimming.pruning import wired
from slimming.pruning.proof import prove_equal
from slimming.pruning.threshold import choose_channels
from slimming.reports import preact
from slimming.storage import architecture, checkpoint, files
from slimming.workflows import before_after


def make_parser() -> Parser:
    parser = flags.pruning_parser(__doc__)
    text = "--model, but then 0.4 is the default of --percent, results go by default to "
    text += "./ckpts/pruned/preact_res<depth>_pruned.pth.tar, and a summary line by line is printed"
    flags.flag(parser, "--ckpt_dir", "PATH", text=text)
    parser.add_argument("--save_dir", dest="save", metavar="DIR", help="the same as --save")
    return parser


def parse() -> argparse.Namespace:
    """The flags. ``--ckpt_dir`` is ``--model`` with the defaults of another suite."""
    parser = make_parser()
    args = flags.split_arch(parser.parse_args())
    if not args.ckpt_dir:
        return flags.parse_pruning(parser)
    if args.model:
        parser.error("--model and --ckpt_dir name the same thing: give one of them")
    path = files.find(Path(args.ckpt_dir), *flags.TO_PRUNE)
    parser.set_defaults(model=str(path), percent=0.4)
    if not args.save:
        depth = architecture.describe(path, checkpoint.read(path), vars(args))["depth"]
        name = args.filename or f"preact_res{depth}_pruned"  # several share that folder
        parser.set_defaults(save="ckpts/pruned", filename=name)
    return flags.parse_pruning(parser)


def main() -> None:
    args = parse()
    dense = before_after.load(args, arch="resnet")
    choice = choose_channels(dense.model, args.percent, round_to=args.round_to)
    slim = wired.slim(dense.model, choice.keep)
    proof = prove_equal(slim, wired.masked(dense.model, choice.keep), dense.images)
    measured = before_after.report(dense, slim, choice, proof)
    if args.ckpt_dir:
        print(f"\n{preact.text(dense, slim, choice, *measured)}")


if __name__ == "__main__":
    entry.run(main)
