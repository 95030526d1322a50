"""Flags that scripts share, and errors as one line."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from models import NETWORKS, PAPER_DEPTH
from slimming import checkpoint, datasets
from slimming.errors import Interrupted, UserError

# What shapes a run besides its network and data; `--resume` finds these in the checkpoint.
SETTINGS = (
    "sr",
    "s",
    "batch_size",
    "epochs",
    "lr",
    "momentum",
    "weight_decay",
    "seed",
    "amp",
    "deterministic",
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, allows no abbreviations, and fails in one line."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def run(main: Callable[[], None]) -> None:
    """Run a script's main; what a person can put right becomes one line on stderr and a status."""
    name = os.path.basename(sys.argv[0])
    try:
        main()
    except UserError as error:
        status, message = error.status, f"error: {error}"
    except KeyboardInterrupt:
        status, message = Interrupted.status, "interrupted: nothing was lost, start it again"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status, message = 1, "error: the reader of the output went away"
    except OSError as error:
        status, message = 2, f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower():
            raise
        status = 2
        message = "error: out of memory: lower --batch-size or --test-batch-size"
    else:
        return
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def number(kind: type, low: float, high: float = math.inf, below: bool = False) -> Callable:
    """An argparse type: an int or float from ``low`` to ``high`` (less than it with ``below``)."""
    limit = f" and {'less than' if below else 'at most'} {high:g}" if high < math.inf else ""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value < high if below or high == math.inf else low <= value <= high):
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"must be {noun} of at least {low:g}{limit}, not {text!r}"
            )
        return value

    return parse


def architecture(text: str) -> str:
    """An argparse type: the name of a network, or preact_res<depth>."""
    if text not in NETWORKS and not re.fullmatch(r"preact_res\d{1,4}", text):
        raise argparse.ArgumentTypeError(
            f"no network is called {text!r}: use {', '.join(NETWORKS)} or preact_res<depth>"
        )
    return text


def split_arch(args: argparse.Namespace) -> None:
    """Read ``--arch preact_resN`` as ``--arch resnet --depth N``; args.spelled keeps the word."""
    args.spelled = args.arch
    if args.arch and args.arch.startswith("preact_res"):
        depth = int(args.arch.removeprefix("preact_res"))
        if args.depth not in (None, depth):
            raise UserError(f"--arch {args.arch} and --depth {args.depth} contradict each other")
        args.arch, args.depth = "resnet", depth


def data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        choices=datasets.NAMES,
        metavar="NAME",
        help=f"{', '.join(datasets.NAMES)} (default: what a given checkpoint was "
        "trained on, else cifar100)",
    )
    group.add_argument(
        "--data", metavar="DIR", help="folder of the dataset (default: ./data.<dataset>)"
    )
    group.add_argument(
        "--test-batch-size",
        type=number(int, 1),
        default=256,
        metavar="N",
        help="batch size of the evaluation (default: 256)",
    )
    group.add_argument(
        "--workers",
        type=number(int, 1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="threads that decode image files (default: the number of cores)",
    )


def device_flags(parser: Parser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)"
    )
    group.add_argument("--no-cuda", action="store_true", help="stay on the CPU")


def output_flags(parser: Parser, save: str, filename: str) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--save", metavar="DIR", help=f"folder of the results (default: {save})")
    group.add_argument(
        "--filename", type=_filename, metavar="NAME", help=f"names the files instead of {filename}"
    )


def _filename(text: str) -> str:
    if not text or os.path.basename(text) != text or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"must be a name without folders, not {text!r}")
    return text


def training_parser(description: str) -> Parser:
    """The flags of main.py and mask-impl/main_mask.py."""
    parser = Parser(description)
    parser.add_argument(
        "--arch",
        type=architecture,
        metavar="NAME",
        help=f"{', '.join(NETWORKS)}, or preact_res<depth> (default: that of a "
        "given checkpoint, else vgg)",
    )
    depths = ", ".join(f"{arch} {depth}" for arch, depth in PAPER_DEPTH.items())
    parser.add_argument(
        "--depth",
        type=number(int, 1),
        metavar="N",
        help=f"depth of the network (default: {depths})",
    )
    parser.add_argument("--refine", metavar="FILE", help="fine-tune this pruned model")
    parser.add_argument(
        "--resume",
        metavar="FILE",
        help="continue from this checkpoint, with its settings where no flag says otherwise",
    )

    group = parser.add_argument_group("sparsity")
    group.add_argument(
        "-sr",
        "--sparsity-regularization",
        dest="sr",
        action="store_true",
        help="train with the L1 penalty on the scaling factors",
    )
    group.add_argument(
        "--s",
        type=number(float, 0),
        default=1e-4,
        metavar="S",
        help="strength of the penalty (default: 1e-4)",
    )

    group = parser.add_argument_group("training")
    for flags, kind, default, text in (
        (["--batch-size"], number(int, 1), 64, "images a step"),
        (["--epochs"], number(int, 1), 160, "epochs to train"),
        (["--start-epoch"], number(int, 0), None, "first epoch, counted from 0"),
        (["--lr"], number(float, 0), 0.1, "learning rate, divided by 10 at 1/2 and 3/4"),
        (["--momentum"], number(float, 0, 1, below=True), 0.9, "momentum of SGD"),
        (["--weight-decay", "--wd"], number(float, 0), 1e-4, "weight decay"),
        (["--seed"], number(int, 0, 2**32, below=True), 1, "seed of weights, order, augmentation"),
        (["--log-interval"], number(int, 1), 100, "batches between two lines"),
    ):
        default_text = "" if default is None else f" (default: {default})"
        group.add_argument(
            *flags, type=kind, default=default, metavar="N", help=text + default_text
        )
    group.add_argument(
        "--amp",
        "-amp_loss",
        action="store_true",
        help="mixed precision: bf16, or fp16 on GPUs without it",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="repeatable CUDA kernels (the CPU repeats anyway)",
    )

    data_flags(parser)
    device_flags(parser)
    output_flags(
        parser,
        "./logs; ./ckpts/<arch>[_sr][_T] with --tag T or --arch preact_res<depth>",
        "checkpoint and model_best",
    )
    parser.add_argument("--tag", type=_filename, metavar="T", help="names the folder of the run")
    parser.add_argument("--no-tensorboard", action="store_true", help="write no event files")
    return parser


def parse_training(description: str) -> argparse.Namespace:
    """The flags of a training run. With ``--resume`` the checkpoint's settings are the defaults."""
    parser = training_parser(description)
    args = parser.parse_args()
    start = args.resume or args.refine
    contents = checkpoint.read(start) if start else {}
    if args.resume:
        recorded = contents.get("settings")
        recorded = recorded if isinstance(recorded, dict) else {}
        known = {
            name: recorded[name]
            for name in SETTINGS
            if type(recorded.get(name)) is type(getattr(args, name))
        }
        # argparse checks a default that is a string as if it had been typed
        parser.set_defaults(
            **{
                name: value if isinstance(value, bool) else str(value)
                for name, value in known.items()
            }
        )
        args = parser.parse_args()
        for name, value in known.items():
            if getattr(args, name) != value:
                flag = "--" + name.replace("_", "-")
                print(f"note: {flag} is {getattr(args, name)} now, it was {value} in {args.resume}")
    args.start, args.contents = start, contents
    split_arch(args)
    return args


def pruning_parser(description: str) -> Parser:
    """The flags that all pruning scripts have."""
    parser = Parser(description)
    parser.add_argument(
        "--model",
        metavar="FILE",
        help="checkpoint of the network to prune; in a folder, the best model",
    )
    parser.add_argument(
        "--arch",
        type=architecture,
        metavar="NAME",
        help="name of the network (default: what the checkpoint says)",
    )
    parser.add_argument(
        "--depth",
        type=number(int, 1),
        metavar="N",
        help="depth of the network (default: what the checkpoint says)",
    )
    parser.add_argument(
        "--percent",
        type=number(float, 0, 1, below=True),
        default=0.5,
        metavar="P",
        help="share of the channels to prune, 0 <= P < 1 (default: 0.5)",
    )
    data_flags(parser)
    device_flags(parser)
    output_flags(parser, "the folder of the model", "pruned")
    return parser


def parse_pruning(parser: Parser) -> argparse.Namespace:
    """Parse the flags of a pruning script; args.model and args.save become paths."""
    args = parser.parse_args()
    split_arch(args)
    if not args.model:
        parser.error("--model FILE is needed: the checkpoint of the network to prune")
    args.model = checkpoint.best_in(Path(args.model))
    args.save = Path(args.save or args.model.parent)
    args.target = args.save / f"{args.filename or 'pruned'}.pth.tar"
    if args.target.exists() and args.model.exists() and args.target.samefile(args.model):
        raise UserError(f"the result would replace {args.model}: give another --save or --filename")
    return args
