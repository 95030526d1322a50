"""The flags that scripts share, each with its default and its help in one place."""

import argparse
import inspect
import os
from collections.abc import Callable
from pathlib import Path

from models import NETWORKS, PAPER_DEPTH
from slimming.cli.parser import Parser, architecture, number, plain_name
from slimming.data import datasets
from slimming.errors import UserError
from slimming.runtime import threads
from slimming.storage import checkpoint, files
from slimming.training.run_folder import RunFolder

# What shapes a run besides its network and data; `--resume` finds these in the checkpoint.
SETTINGS = (
    *("sr", "s", "batch_size", "epochs", "lr", "momentum", "weight_decay", "seed", "amp"),
    "deterministic",
)

COUNT = number(int, 1, 2**31 - 1)
# In a folder, the first of them that is there.
PRUNED = ("pruned.pth.tar", "*_pruned.pth.tar")
TO_PRUNE = ("model_best.pth.tar", "*_best.pth.tar", *PRUNED)
TO_REFINE = (*PRUNED, "*_rebuilt.pth", "*_pruned.pth")

OPTIONS = {  # of a DenseNet's constructor, by flag
    "--growth-rate": ("growthRate", "N", COUNT, "channels that each block of a densenet adds"),
    "--drop-rate": ("dropRate", "P", number(float, 0, 1, below=True), "dropout in its blocks"),
    "--compression-rate": ("compressionRate", "R", number(float, 1), "its transitions divide by R"),
}


def parse_training(description: str, others: tuple[str, ...] = ()) -> argparse.Namespace:
    """The flags of a training run. With ``--resume`` the checkpoint's settings are the defaults.

    ``args.start`` is the file that the run starts from, if any, ``args.contents`` what it holds.
    ``others``: see `slimming.cli.parser.Parser`.
    """
    return parse_run(training_parser(description, others), SETTINGS, _complete)


def _complete(args: argparse.Namespace) -> argparse.Namespace:
    """UserError where --refine starts a run and --resume names another one to continue."""
    if args.refine and args.resume not in (None, "auto"):
        raise UserError(
            "--refine and --resume contradict each other: leave --refine out to continue a run, or "
            "use --resume auto, which starts from --refine while there is no checkpoint in --save"
        )
    return split_arch(args)


def parse_run(
    parser: Parser,
    settings: tuple[str, ...],
    complete: Callable[[argparse.Namespace], argparse.Namespace],
) -> argparse.Namespace:
    """The same for a script with flags of its own: ``settings`` names those that a checkpoint
    keeps, ``complete`` fills in what follows from others."""
    args = complete(parser.parse_args())
    if args.resume == "auto":
        args.resume = _last_checkpoint(args)
    for name, patterns in (("resume", ("checkpoint.pth.tar",)), ("refine", TO_REFINE)):
        if getattr(args, name):
            setattr(args, name, str(files.find(Path(getattr(args, name)), *patterns)))
    resume, refine = args.resume, args.refine
    start = resume or refine
    contents = checkpoint.read(start) if start else {}
    if resume:
        args = complete(_with_settings_of(parser, args, contents, settings))
        args.resume, args.refine = resume, refine
    args.start, args.contents = start, contents
    return args


def one_process(work: str) -> None:
    """UserError if torchrun started several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{work} is work for one process: start it without torchrun")


def parse_pruning(parser: Parser) -> argparse.Namespace:
    """The flags of a pruning script. ``args.model`` and ``args.save`` become paths, and
    ``args.target`` is the file to write."""
    args = split_arch(parser.parse_args())
    one_process("pruning")
    if not args.model:
        parser.error("--model FILE is needed: the checkpoint of the network to prune")
    args.model = files.find(Path(args.model), *TO_PRUNE)
    args.save = Path(args.save or args.model.parent)
    args.target = args.save / f"{args.filename or 'pruned'}.pth.tar"
    if args.target.exists() and not _replaceable(args.target, args.model):
        raise UserError(
            f"{args.target} is there and would be lost: give another --save or --filename"
        )
    return args


def _replaceable(target: Path, model: Path) -> bool:
    """Whether ``target`` is the result of an earlier pruning, which says how wide the network is,
    and not what is to be pruned now."""
    try:
        contents = checkpoint.read(target)
    except UserError:
        return False
    trained = contents.get("epoch") or contents.get("optimizer")
    return "cfg" in contents and not trained and not (model.exists() and target.samefile(model))


def training_parser(description: str, others: tuple[str, ...] = ()) -> Parser:
    """The flags of main.py and mask-impl/main_mask.py."""
    parser = Parser(description, others)
    depths = ", ".join(f"{arch} {depth}" for arch, depth in PAPER_DEPTH.items())
    _network_flags(parser, ", else vgg", f", else {depths}")
    for name, (option, metavar, kind, text) in OPTIONS.items():
        default = inspect.signature(NETWORKS["densenet"]).parameters[option].default
        text += f" (default: that of the checkpoint, else {default})"
        flag(parser, name, metavar, kind, text=text)
    flag(parser, "--refine", "FILE", text="fine-tune this pruned model")
    text = "continue from this checkpoint, with its settings; auto: the last one in --save, if any"
    flag(parser, "--resume", "FILE", text=text)

    group = parser.add_argument_group("sparsity")
    names = ("-sr", "--sparsity-regularization")
    text = "train with the L1 penalty on the scaling factors"
    setting(group, *names, dest="sr", text=text)
    penalty_flag(group, "strength of the penalty")

    group = parser.add_argument_group("training")
    flag(group, "--batch-size", "N", COUNT, 64, "images a step")
    flag(group, "--epochs", "N", COUNT, 160, "epochs to train")
    epochs = number(int, 0, 2**31 - 1)
    flag(group, "--start-epoch", "N", epochs, text="first epoch, counted from 0")
    flag(group, "--lr", "R", number(float, 0), 0.1, "learning rate, / 10 at 1/2 and at 3/4")
    flag(group, "--momentum", "M", number(float, 0, 1, below=True), 0.9, "momentum of SGD")
    flag(group, "--weight-decay", "W", number(float, 0), 1e-4, "weight decay", also="--wd")
    seeds = number(int, 0, 2**32, below=True)
    flag(group, "--seed", "N", seeds, 1, "seed of the weights, the order, the augmentation")
    flag(group, "--log-interval", "N", COUNT, 100, "batches between two printed lines")
    setting(group, "--amp", "-amp_loss", text="mixed precision: bf16, or fp16 on older GPUs")
    setting(group, "--deterministic", text="repeatable CUDA kernels (the CPU repeats anyway)")
    text = "compile the network with torch.compile, on CUDA into CUDA graphs"
    switch(group, "--compile", text=text)
    switch(group, "--sync-bn", text="batch statistics over all processes (CUDA, torchrun)")

    data_flags(parser, ", else cifar10 with --arch preact_res<depth>, else cifar100")
    saved = "./logs; ./ckpts/<arch>[_sr][_T] with --tag T or --arch preact_res<depth>"
    group = output_flags(parser, saved, "checkpoint and model_best")
    flag(group, "--tag", "T", plain_name, text="names the folder of the run")
    switch(group, "--no-tensorboard", text="write no event files")
    return parser


def pruning_parser(description: str) -> Parser:
    """The flags that all pruning scripts have."""
    parser = Parser(description)
    flag(parser, "--model", "FILE", text="checkpoint to prune; in a folder, the best model")
    shares = number(float, 0, 1, below=True)
    flag(parser, "--percent", "P", shares, 0.5, "share of the channels to prune, 0 <= P < 1")
    text = "keep a multiple of N channels in each layer, never fewer than the threshold would"
    flag(parser, "--round-to", "N", COUNT, 1, text)
    _network_flags(parser)
    data_flags(parser)
    output_flags(parser, "the folder of the model", "pruned")
    return parser


def _network_flags(parser: Parser, arch: str = "", depth: str = "") -> None:
    """``arch``, ``depth``: the defaults where no checkpoint says."""
    names = f"{', '.join(NETWORKS)}, preact_res<depth>, or torchvision's name of a classification "
    names += f"model (default: that of the checkpoint{arch})"
    flag(parser, "--arch", "NAME", architecture, text=names)
    text = f"depth of the network (default: that of the checkpoint{depth})"
    flag(parser, "--depth", "N", COUNT, text=text)


def data_flags(
    parser: Parser, dataset: str = "", names: tuple[str, ...] = ()
) -> argparse._ArgumentGroup:
    """Where the images come from and where the work is done. ``dataset``: the default where no
    checkpoint says. ``names``: what a script takes besides those of `slimming.data.datasets`."""
    names = (*datasets.NAMES, *names)
    group = parser.add_argument_group("data and device")
    text = f"{', '.join(names)} (default: that of the checkpoint{dataset})"
    group.add_argument("--dataset", choices=names, metavar="NAME", help=text)
    flag(group, "--data", "DIR", text="folder of the dataset (default: ./data.<dataset>)")
    text = "pixels of an image's side; not 32: streamed from --dataset folder (default: 32)"
    flag(group, "--image-size", "N", COUNT, text=text)
    flag(group, "--test-batch-size", "N", COUNT, 256, "images a step of the evaluation")
    cores = os.cpu_count() or 1
    flag(group, "--workers", "N", COUNT, cores, "threads or processes that decode image files")
    text = "threads of the computation on the CPU (default: PyTorch's choice)"
    kind = {"type": number(int, 1, threads.MOST), "action": threads.SetThreads}
    group.add_argument("--threads", metavar="N", help=text, **kind)
    flag(group, "--device", "NAME", text="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    switch(group, "--no-cuda", text="stay on the CPU")
    return group


def split_data_path(args: argparse.Namespace) -> None:
    """Read ``--data_path`` as ``--dataset`` (CIFAR10, CIFAR100) or as ``--data`` (a folder).

    UserError if it contradicts that flag.
    """
    name = (args.data_path or "").lower()
    flag, said = ("dataset", name) if name in datasets.ON_DISK else ("data", args.data_path)
    if said and getattr(args, flag) not in (None, said):
        raise UserError(
            f"--{flag} {getattr(args, flag)} and --data_path {said} contradict each other: leave "
            "one of them out"
        )
    setattr(args, flag, said or getattr(args, flag))


def output_flags(parser: Parser, save: str, filename: str) -> argparse._ArgumentGroup:
    """Where results go: the default folder, the names that --filename replaces."""
    group = parser.add_argument_group("output")
    flag(group, "--save", "DIR", text=f"folder of the results (default: {save})")
    flag(group, "--filename", "NAME", plain_name, text=f"names the files instead of {filename}")
    return group


def flag(group, name: str, metavar: str, kind=str, default=None, text="", also=None) -> None:
    """A flag with a value, its default told in the help."""
    text += "" if default is None else f" (default: {default})"
    names = [name, also] if also else [name]
    group.add_argument(*names, metavar=metavar, type=kind, default=default, help=text)


def switch(group, name: str, text: str) -> None:
    """A flag that is off unless given."""
    group.add_argument(name, action="store_true", help=text)


def penalty_flag(group, text: str) -> None:
    """``--s``, and ``--sparsity`` for torchrun: it takes ``--s`` for one of its own flags."""
    flag(group, "--s", "S", number(float, 0), 1e-4, text, also="--sparsity")


def true_or_false(group, name: str, text: str, default: bool | None = False) -> None:
    """A switch that also takes True or False as its value, as Lubana and Dick have it."""
    kind = {"type": truth, "nargs": "?", "const": True, "metavar": "True/False"}
    group.add_argument(name, help=text, default=default, **kind)


def truth(text: str) -> bool:
    """An argparse type: True or False, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return text.lower() == "true"


def setting(group, *names: str, text: str, **more) -> None:
    """A switch that a checkpoint may have turned on, and ``--no-...`` turns off."""
    off = argparse.BooleanOptionalAction
    group.add_argument(*names, action=off, default=False, help=text, **more)


def _with_settings_of(
    parser: Parser, args: argparse.Namespace, contents: dict, settings: tuple[str, ...]
) -> argparse.Namespace:
    """Parse again with the checkpoint's settings as defaults; say which ones flags changed."""
    recorded = contents.get("settings")
    recorded = recorded if isinstance(recorded, dict) else {}
    known = {n: recorded[n] for n in settings if type(recorded.get(n)) is type(getattr(args, n))}
    # argparse checks a default that is a string as if it had been typed
    defaults = {n: v if isinstance(v, bool) else str(v) for n, v in known.items()}
    parser.set_defaults(**defaults)
    resume, args = args.resume, parser.parse_args()
    for name, value in known.items():
        if getattr(args, name) != value:
            words = next(a.option_strings for a in parser._actions if a.dest == name)
            print(f"note: {words[0]} is {getattr(args, name)} now, it was {value} in {resume}")
    return args


def _last_checkpoint(args: argparse.Namespace) -> str | None:
    """The checkpoint from which a run with these flags goes on; None if it has not begun."""
    fresh = argparse.Namespace(**{**vars(args), "resume": None})
    last = RunFolder(fresh, args.arch or "vgg").last
    return str(last) if last.exists() else None


def split_arch(args: argparse.Namespace) -> argparse.Namespace:
    """Read ``--arch preact_resN`` as ``--arch resnet --depth N``; args.spelled keeps the word,
    args.options what OPTIONS name."""
    args.spelled = args.arch
    given = {
        option[0]: vars(args).get(name[2:].replace("-", "_")) for name, option in OPTIONS.items()
    }
    args.options = {name: value for name, value in given.items() if value is not None} or None
    if args.arch and args.arch.startswith("preact_res"):
        depth = int(args.arch.removeprefix("preact_res"))
        if args.depth not in (None, depth):
            raise UserError(f"--arch {args.arch} and --depth {args.depth} contradict each other")
        args.arch, args.depth = "resnet", depth
    return args
