"""One experiment in one command: train a network, prune it, fine-tune it, report.

python run.py --dataset cifar10 --model resnet18 --pruning-method channel --pruning-ratio 0.5
"""

import argparse
import contextlib
import json
import shlex
import sys
from datetime import datetime
from pathlib import Path

from slimming.cli import entry, flags
from slimming.cli.parser import Parser, architecture, number
from slimming.errors import Interrupted, UserError
from slimming.pruning.importance import MEASURES
from slimming.storage import files
from slimming.workflows import methods, stages

INTERNAL = {
    "label",
    "imagenet",
    "arch",
    "depth",
    "spelled",
    "options",
}  # they follow from other settings
PASSING = {"resume", "save_model", "eval_only", "command"}
PASSING |= {"workers", "threads", "device", "no_cuda"}  # of the machine


def main() -> None:
    flags.one_process("run.py")
    args = complete(make_parser().parse_args())
    if args.eval_only:
        stages.evaluate(args)
        return
    methods.check(args)
    given = stages.given_base(args)
    folder = experiment_folder(args)
    files.write_bytes(folder / "config.json", json.dumps(config_of(args), indent=1).encode())
    with logged(folder / "log.txt"), interruption(folder):
        record = stages.Record(folder / "metrics.json", args)
        base = stages.train_base(args, given, folder, record)
        if not args.skip_pruning:
            pruned = stages.prune(args, base, folder, record)
            if args.finetune_epochs:
                stages.fine_tune(args, pruned, folder, record)
        stages.report(args, folder, record, config_of(args))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    count = flags.COUNT
    shares = number(float, 0, 1, below=True)
    group = parser.add_argument_group("network and results")
    text = "resnet18, resnet50, vgg16, mobilenet_v3_large, any other classification model of"
    text += " torchvision, or a network of main.py"
    flags.flag(group, "--model", "NAME", architecture, "resnet18", text)
    text = "start from torchvision's weights of this name instead of fresh ones: DEFAULT"
    flags.flag(group, "--weights", "NAME", text=text)
    flags.flag(group, "--output-dir", "DIR", Path, Path("experiments"), "where experiments go")

    group = parser.add_argument_group("base training")
    flags.flag(group, "--base-train-epochs", "N", count, 100, "epochs")
    flags.flag(group, "--learning-rate", "R", number(float, 0), 0.05, "/ 10 at 1/2 and at 3/4")
    flags.flag(group, "--batch-size", "N", count, 128, "images a step")
    flags.flag(group, "--weight-decay", "W", number(float, 0), 5e-4, "weight decay")
    text = "end a training whose top-1 has not risen for N epochs; 0: never"
    flags.flag(group, "--patience", "N", number(int, 0, 10**6), 0, text)
    text = "L1 penalty on the scaling factors, with --pruning-method slimming"
    flags.penalty_flag(group, text)
    flags.flag(group, "--seed", "N", number(int, 0, 2**32, below=True), 1, "seed of everything")

    group = parser.add_argument_group("pruning")
    text = "channel: whole filters; kernel: k x k kernels; intra-kernel: patterns of weights in"
    text += " kernels; slimming: channels by scaling factor (default: channel)"
    group.add_argument("--pruning-method", choices=methods.METHODS, default="channel", help=text)
    flags.flag(group, "--pruning-ratio", "P", shares, 0.5, "share to remove, 0 <= P < 1")
    text = "one ranking over the whole network; else each layer loses the same share"
    flags.switch(group, "--global-pruning", text)
    measures = [name for name in MEASURES if name != "biased_loss_tracked"]  # that takes training
    text = f"of --pruning-method channel: {', '.join(measures)} (default: l1; lamp with"
    text += " --global-pruning, whose ranking needs scores that compare over layers)"
    group.add_argument("--importance", choices=measures, metavar="M", help=text)
    flags.flag(group, "--round-to", "N", count, 1, "keep a multiple of N channels in each layer")
    text = "leave this layer, or the layers inside this module, alone; can be repeated"
    group.add_argument("--ignore", metavar="LAYER", action="append", default=[], help=text)

    group = parser.add_argument_group("fine-tuning")
    flags.flag(group, "--finetune-epochs", "N", number(int, 0, 10**6), 20, "epochs; 0: none")
    flags.flag(group, "--finetune-lr", "R", number(float, 0), 0.01, "/ 10 at 1/2 and at 3/4")

    group = parser.add_argument_group("execution")
    flags.switch(group, "--no-fp16", "train in fp32 (else mixed precision: bf16, fp16 on old GPUs)")
    flags.switch(group, "--resume", "go on with the newest unfinished experiment of these settings")
    text = "start from --model-path, --weights, or the newest base model in --output-dir"
    flags.switch(group, "--skip-base-training", text)
    flags.switch(group, "--skip-pruning", "train and report the base model alone")
    flags.switch(group, "--eval-only", "only evaluate --model-path")
    flags.switch(group, "--save-model", "keep the base model and the last epoch of each training")
    flags.flag(group, "--model-path", "FILE", Path, text="saved network to load")
    group = flags.data_flags(parser, ", else cifar10", names=("imagenet",))
    text = "--workers; 0 is 1"
    workers = number(int, 0, 10**6)
    group.add_argument("--num-workers", type=workers, dest="workers", metavar="N", help=text)
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Check what belongs together; ImageNet is a folder of larger images."""
    args.imagenet = args.dataset == "imagenet"
    args.label = args.dataset or "cifar10"
    args.dataset = "folder" if args.imagenet else args.dataset
    if args.imagenet:
        args.data, args.image_size = args.data or "./data.imagenet", args.image_size or 224
    if args.eval_only and not args.model_path:
        raise UserError("--eval-only needs --model-path FILE, the network to evaluate")
    if args.model_path and not (args.eval_only or args.skip_base_training):
        raise UserError("--model-path goes with --skip-base-training or with --eval-only")
    if args.importance and args.pruning_method != "channel":
        raise UserError("--importance is of --pruning-method channel: leave one of them out")
    if args.round_to > 1 and "kernel" in args.pruning_method:
        raise UserError("--round-to is of --pruning-method channel and slimming: leave it out")
    args.importance = args.importance or ("lamp" if args.global_pruning else "l1")
    args.workers = max(1, args.workers)
    if args.model_path:
        args.model_path = files.find(args.model_path, "*_rebuilt.pth", "model_best.pth.tar")
    args.arch, args.depth = args.model, None
    return flags.split_arch(args)


def config_of(args: argparse.Namespace) -> dict:
    """Every setting of the experiment, and the command that repeats it."""
    told = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    told["dataset"] = args.label
    settings = {name: value for name, value in told.items() if name not in INTERNAL}
    return {**settings, "command": shlex.join(["python", *sys.argv])}


def experiment_folder(args: argparse.Namespace) -> Path:
    """<output-dir>/<dataset>/<model>_<method>_<dataset>_<time>; with --resume that of the newest
    unfinished experiment of the same settings, if there is one."""
    parent = args.output_dir / args.label
    stem = f"{args.model}_{args.pruning_method}_{args.label}"
    if args.resume:
        for config in sorted(parent.glob(f"{stem}_*/config.json"), reverse=True):
            unfinished = not (config.parent / "report.html").exists()
            if unfinished and same_settings(config, args):
                print(f"going on in {config.parent}")
                return config.parent
        print("note: no unfinished experiment of these settings is there: a new one begins")
    name, number = f"{stem}_{datetime.now():%Y%m%d_%H%M%S}", 1
    folder = parent / name
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    folder.mkdir(parents=True)
    return folder


def same_settings(config: Path, args: argparse.Namespace) -> bool:
    """Whether the experiment of this file has the settings of ``args``."""
    try:
        told = json.loads(config.read_text())
    except (OSError, ValueError):
        return False
    ours = json.loads(json.dumps(config_of(args)))
    return all(told.get(n) == ours[n] for n in ours.keys() - PASSING)


@contextlib.contextmanager
def interruption(folder: Path):
    """Ctrl-C says how to go on."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        words = [word for word in sys.argv if word != "--resume"]
        command = shlex.join(["python", *words, "--resume"])
        raise Interrupted(f"interrupted in {folder}; continue with: {command}") from None


@contextlib.contextmanager
def logged(path: Path):
    """What is printed goes into the file too."""
    with open(path, "a") as file, contextlib.redirect_stdout(_Tee(sys.stdout, file)):
        yield


class _Tee:
    """Two streams as one; what they are asked beyond writing, the first answers."""

    def __init__(self, screen, file):
        self.screen, self.file = screen, file

    def write(self, text: str) -> int:
        self.file.write(text)
        return self.screen.write(text)

    def flush(self) -> None:
        self.file.flush()
        self.screen.flush()

    def __getattr__(self, name: str):
        return getattr(self.screen, name)


if __name__ == "__main__":
    entry.run(main)
