"""Prune and train in rounds, by any measure of importance (Lubana and Dick, ICLR 2021).

After --warmup_epochs of training, each of --n_rounds epochs begins by removing equally many
filters, the least important first; the rest of the --epochs trains what is left.

    python flowprune.py --model=resnet-56 --pruning_type=mag_based --prune_percent=75 --n_rounds=25
"""

import argparse
import json
from pathlib import Path

from slimming.cli import entry, flags
from slimming.cli.parser import Parser, number
from slimming.data import datasets
from slimming.errors import UserError
from slimming.pruning.groups import need_library
from slimming.pruning.importance import MEASURES
from slimming.storage import files
from slimming.training.trainer import Experiment
from slimming.workflows.rounds import LR, Rounds

MODELS = ("vgg", "mobilenet", "resnet-56", "resnet-34", "resnet-18")
FULL_RATE = 80  # epochs at LR, of 160: rounds and warm-up fit into them


def main() -> None:
    args = flags.parse_run(make_parser(), SETTINGS, complete)
    need_library()
    args.refine = None  # the pretrained network is args.start; it is pruned, not fine-tuned
    experiment = Experiment(args, settings=SETTINGS)
    rounds = Rounds(args, experiment)
    experiment.fit(on_gradients=rounds.trackers, before_epoch=rounds.before_epoch)
    rounds.report()


def make_parser() -> Parser:
    parser = Parser(__doc__)
    count = flags.COUNT
    group = parser.add_argument_group("network and pruning")
    group.add_argument("--model", choices=MODELS, default="resnet-56", help="(default: resnet-56)")
    text = "start from this network of main.py instead of fresh weights"
    flags.flag(group, "--pretrained_path", "FILE", str, "0", text)
    text = f"measure of importance: {', '.join(MEASURES)} (default: mag_based)"
    group.add_argument(
        "--pruning_type", choices=MEASURES, default="mag_based", metavar="M", help=text
    )
    shares = number(float, 0, 100, below=True)
    flags.flag(
        group, "--prune_percent", "P", shares, 75.0, "percent of the filters to prune, 0 to 95"
    )
    flags.flag(group, "--n_rounds", "N", count, 1, "epochs over which pruning is spread")
    text = (
        "percent of the original filters gone after each round, in place of equal steps: [10,50,80]"
    )
    flags.flag(group, "--thresholds", "LIST", thresholds, "", text)
    epochs = number(int, 0, 10**6)
    flags.flag(
        group, "--warmup_epochs", "N", epochs, 0, "epochs of training before the first round"
    )
    text = "lift the limits: 95 %% in all and of any layer, 80 epochs at full learning rate, T = 1"
    text += " for grad_preserve"
    flags.true_or_false(group, "--bypass", text)

    group = parser.add_argument_group("importance")
    temperatures = number(float, 1e-6)
    flags.flag(
        group, "--T", "T", temperatures, 5.0, "temperature of the loss in training and pruning"
    )
    flags.flag(group, "--grasp_T", "T", temperatures, 200.0, "temperature for GraSP")
    flags.flag(group, "--imp_samples", "N", count, 2560, "training images that importance is from")
    flags.true_or_false(
        group, "--track_importance", "average it over minibatches of training instead"
    )
    text = "how many of the last minibatches (default: 20); True or False: --track_importance"
    group.add_argument(
        "--track_batches", metavar="N", type=_switch_or_count, default=20, action=_Track, help=text
    )
    flags.flag(
        group, "--alpha", "A", number(float, 0, 1, below=True), 0.8, "factor of that average"
    )
    flags.true_or_false(group, "--use_l2", "bias importance towards removing small weights")
    flags.true_or_false(
        group, "--use_init", "bias it towards removing what is still near its initial value"
    )

    group = parser.add_argument_group("training")
    flags.flag(group, "--epochs", "N", count, 160, "all epochs: 80 at 0.1, 40 at 0.01, 40 at 0.001")
    flags.flag(group, "--lr_prune", "R", number(float, 0), 0.1, "learning rate in the rounds")
    flags.flag(group, "--moment", "M", number(float, 0, 1, below=True), 0.9, "momentum of SGD")
    flags.true_or_false(group, "--preserve_moment", "momentum follows its channels through a round")
    flags.flag(group, "--batch-size", "N", count, 128, "images a step")
    flags.flag(group, "--weight-decay", "W", number(float, 0), 1e-4, "weight decay")
    flags.flag(group, "--seed", "N", number(int, 0, 2**32, below=True), 0, "seed of everything")
    flags.flag(group, "--log-interval", "N", count, 100, "batches between two printed lines")
    flags.setting(group, "--amp", text="mixed precision: bf16, or fp16 on older GPUs")
    flags.setting(group, "--deterministic", text="repeatable CUDA kernels")
    text = "continue from this checkpoint, with its settings; auto: the last one in --save, if any"
    flags.flag(group, "--resume", "FILE", text=text)

    group = flags.data_flags(parser, ", else that of --data_path")
    text = "CIFAR10, CIFAR100, or a folder with train/ and test/ (default: CIFAR100)"
    flags.flag(group, "--data_path", "DIR", text=text)
    flags.true_or_false(group, "--download", "download CIFAR if it is not there")
    text = "outputs of the network, at least as many as the data has classes (default: as many)"
    flags.flag(group, "--num_classes", "N", count, text=text)
    group = flags.output_flags(parser, "./pruned_nets/<model>_<measure>_<percent>", "checkpoint")
    flags.true_or_false(group, "--track_stats", "write stats.json")
    flags.switch(group, "--no-tensorboard", "write no event files")
    return parser


class _Track(argparse.Action):
    """--track_batches, which the original has twice: as a switch and as a number."""

    def __call__(self, parser, namespace, value, option_string=None):
        setattr(namespace, "track_importance" if isinstance(value, bool) else self.dest, value)


def _switch_or_count(text: str) -> bool | int:
    return flags.truth(text) if text.lower() in ("true", "false") else flags.COUNT(text)


# What shapes a run: `--resume` finds these in the checkpoint.
SETTINGS = (
    *(
        "model",
        "pruning_type",
        "prune_percent",
        "n_rounds",
        "thresholds",
        "warmup_epochs",
        "bypass",
    ),
    *("T", "grasp_T", "imp_samples", "track_importance", "track_batches", "alpha"),
    *("use_l2", "use_init", "epochs", "lr_prune", "moment", "preserve_moment", "batch_size"),
    *("weight_decay", "seed", "amp", "deterministic", "track_stats"),
)


def thresholds(text: str) -> str:
    """A list of rising percentages, kept as text."""
    try:
        steps = json.loads(text) if text else []
        good = all(0 <= a < b < 100 for a, b in zip([0, *steps], [*steps], strict=False))
        good = good and (not text or (isinstance(steps, list) and len(steps) > 0))
    except (ValueError, TypeError):
        good = False
    if not good:
        raise argparse.ArgumentTypeError(
            f"must be rising percentages like [10,50,80], not {text!r}"
        )
    return text


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Check what belongs together, and say it in the words of `Experiment`."""
    args.arch, args.depth = args.model, 13 if args.model == "vgg" else None
    args.spelled, args.lr, args.momentum, args.sr, args.s = None, LR, args.moment, False, 0.0
    args.start_epoch, args.compile, args.sync_bn, args.tag = None, False, False, None
    args.refine = None
    if args.thresholds:
        args.n_rounds = len(json.loads(args.thresholds))
        args.prune_percent = float(json.loads(args.thresholds)[-1])
    spent, full_rate = args.warmup_epochs + args.n_rounds, FULL_RATE * args.epochs // 160
    limit = args.epochs if args.bypass else max(1, full_rate)
    if spent > limit:
        raise UserError(
            f"--warmup_epochs and --n_rounds take {spent} epochs, more than the {limit} at full "
            f"learning rate of --epochs {args.epochs}: fewer of them, or --bypass"
        )
    if args.prune_percent > 95 and not args.bypass:
        raise UserError(f"--prune_percent {args.prune_percent:g} is past 95: less, or --bypass")
    if args.use_l2 and args.use_init:
        raise UserError("--use_l2 and --use_init contradict each other: give one of them")
    if args.pretrained_path != "0":
        args.refine = str(files.find(Path(args.pretrained_path), "model_best.pth.tar"))
    _choose_data(args)
    label = f"{args.model}_{args.pruning_type}_{args.prune_percent:g}"
    args.save = args.save or (None if args.resume not in (None, "auto") else f"pruned_nets/{label}")
    return args


def _choose_data(args: argparse.Namespace) -> None:
    """--data_path as --dataset and --data. UserError if CIFAR is not there nor to be downloaded."""
    known = args.dataset or args.resume not in (None, "auto")  # the checkpoint says which data
    args.data_path = args.data_path or (None if known else "CIFAR100")
    flags.split_data_path(args)
    args.dataset = args.dataset or (None if known else "folder")
    if known or args.dataset == "folder":
        return
    folder = Path(args.data or f"./data.{args.dataset}")
    if not args.download and not (folder / datasets.ON_DISK[args.dataset]).is_dir():
        raise UserError(
            f"{args.data_path} is not in {folder}: add --download True, say where with --data, "
            "or try --dataset digits"
        )


if __name__ == "__main__":
    entry.run(main)
