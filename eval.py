"""What a checkpoint holds: network, widths, accuracy, size and speed, beside the dense network.

python eval.py logs/vgg-pruned
python eval.py --model vgg --pruned True --model_path logs/pruned.pth.tar --test_acc True
"""

import argparse
import contextlib
import itertools
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from models import widths
from slimming.cli import entry, flags
from slimming.cli import parser as flag_types
from slimming.cli.parser import Parser
from slimming.data import datasets, loading
from slimming.data.stream import Stream
from slimming.errors import UserError
from slimming.measuring import profiling
from slimming.pruning import kernels, wired
from slimming.pruning.scaling import alive_channels, present_channels
from slimming.pruning.threshold import keep_one
from slimming.reports import tables
from slimming.runtime.device import choose_device
from slimming.storage import architecture, checkpoint, files
from slimming.training import loop

ANSWERS = {
    "--train_acc": "top-1 and loss on the training images",
    "--test_acc": "top-1 and loss on the test images",
    "--flops": "FLOPs (2 x multiply-accumulates) of an image; needs no data",
    "--compression": "size of the dense network / its size; needs no data",
}
SWITCHES = (*ANSWERS, "--pruned", "--download")
IN_FOLDER = (*flags.TO_PRUNE, "*_rebuilt.pth", "*_pruned.pth", "*_base.pth")  # the first of them
BATCHES = (1, 64)  # images of which latency is measured
SIZES = ("parameters", "effective_parameters", "FLOPs", "effective_FLOPs", "bytes")
LINES = {  # what a person reads of each answer
    "network": "{network}: {checkpoint}, {file_bytes:,} bytes",
    "epoch": "epoch {epoch}, best top-1 {best}: what the file records; on {device}",
    "test": "test: top-1 {test[prec1]:.2%}, loss {test[loss]:.4f}",
    "train": "train: top-1 {train[prec1]:.2%}, loss {train[loss]:.4f}",
    "FLOPs": "{FLOPs:,} FLOPs an image, {effective_FLOPs:,} without weights that are zero",
    "compression": "compression: parameters {compression[parameters]:.2f}x, FLOPs "
    "{compression[FLOPs]:.2f}x, bytes {compression[bytes]:.2f}x",
}


@dataclass
class Subject:
    """The network in a file, and as ``models`` the slim one that is measured and the dense one."""

    args: argparse.Namespace
    contents: dict
    network: architecture.Network
    model: nn.Module
    models: list[nn.Module]
    layers: dict[str, list[int]]  # the channels that each puts out: of the slim, of the dense


def main() -> None:
    args = parse(sys.argv[1:])
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer alone
        found = evaluate(load(args))
    print(as_json(found) if args.json else as_text(found))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="file or its folder")
    flags.flag(parser, "--model_path", "FILE", text="the same as CHECKPOINT")
    kind = {"dest": "arch", "metavar": "NAME", "type": flag_types.architecture}
    told = "vgg, mobilenet, resnet, resnet-56, ... (default: that of the checkpoint)"
    parser.add_argument("--model", "--arch", help=told, **kind)
    flags.flag(parser, "--depth", "N", flags.COUNT, text="depth, where the file does not say")
    text = "outputs of the network, checked if given"
    flags.flag(parser, "--num_classes", "N", flags.COUNT, text=text)
    flags.true_or_false(parser, "--pruned", "whether it is pruned, checked if given", None)
    group = parser.add_argument_group("what to tell (default: all but --train_acc)")
    for name, told in ANSWERS.items():
        flags.true_or_false(group, name, told)
    flags.switch(group, "--json", "print one JSON object")
    group = flags.data_flags(parser)
    flags.flag(group, "--data_path", "DIR", text="CIFAR10, CIFAR100, or the folder of the dataset")
    flags.true_or_false(group, "--download", "download CIFAR if it is not there")
    return parser


def parse(words: list[str]) -> argparse.Namespace:
    """The flags; ``args.path`` is the checkpoint. ``--flops FILE`` is ``--flops True FILE``."""
    parser = make_parser()
    valued = [after.lower() in ("true", "false") for after in [*words[1:], ""]]
    pairs = zip(words, valued, strict=False)
    words = [f"{w}=True" if w in SWITCHES and not has else w for w, has in pairs]
    args = flags.split_arch(parser.parse_args(words))
    if bool(args.checkpoint) == bool(args.model_path):
        parser.error("one checkpoint is needed: CHECKPOINT or --model_path FILE")
    args.path = files.find(Path(args.checkpoint or args.model_path), *IN_FOLDER)
    return args


def load(args: argparse.Namespace) -> Subject:
    """The network in ``args.path``. UserError where flags contradict the file or each other."""
    contents = checkpoint.read(args.path)
    flags.split_data_path(args)
    if args.data_path:
        args.dataset = args.dataset or contents.get("dataset") or "folder"
    if args.arch == "resnet" and str(contents.get("arch")).startswith("resnet"):
        args.arch = contents["arch"]  # the original says --model resnet to its ResNet-56
    model, network = architecture.rebuild(args.path, contents, vars(args))
    models = [without_masked_channels(model, network), replace(network, cfg=None).build()]
    slim, dense = map(channels, models)
    whole = profiling.count_parameters(models[0])
    left, _ = profiling.count_effective(models[0], network.image_size)
    pruned = slim != dense or left < (1 - kernels.SPARSE) * whole
    if args.pruned not in (None, pruned):
        held = "pruned" if pruned else "dense"
        raise UserError(f"{args.path} holds a {held} network, but --pruned {args.pruned} was given")
    args.pruned, args.device = pruned, choose_device(args.device, args.no_cuda)
    model, *models = (m.to(args.device).eval() for m in (model, *models))
    layers = {name: [slim[name], dense[name]] for name in dense}
    return Subject(args, contents, network, model, models, layers)


def without_masked_channels(model: nn.Module, network: architecture.Network) -> nn.Module:
    """The slim network that a masked one (of mask-impl) stands for; any other as it is."""
    alive = alive_channels(model)
    if network.cfg or not hasattr(model, "wiring") or all(m.all() for m in alive.values()):
        return model
    return wired.slim(model, keep_one(model, alive))


def channels(model: nn.Module) -> dict[str, int]:
    """The channels that each layer puts out; of a BN those that its selection passes on."""
    present = {name: int(mask.sum()) for name, mask in present_channels(model).items()}
    return {name: shape[-1] for name, shape in widths(model).items()} | present


def evaluate(subject: Subject) -> dict:
    """What the flags ask for: accuracies as fractions of 1, latencies in ms, FLOPs of an image."""
    args = subject.args
    everything = not (args.train_acc or args.test_acc or args.flops or args.compression)
    found = record(subject) if everything else {}
    found |= {"test": score(subject, "test")} if everything or args.test_acc else {}
    found |= {"train": score(subject, "train")} if args.train_acc else {}
    pixels = subject.network.image_size
    slim, dense = measure(subject.models, args, pixels, BATCHES if everything else ())
    ratios = {name: dense[name] / max(slim[name], 1e-9) for name in dense}
    found |= {n: value for n, value in slim.items() if everything or (args.flops and "FLOPs" in n)}
    if everything or args.compression:
        found["compression"] = {name: ratios[name] for name in ("parameters", "FLOPs", "bytes")}
    if everything:
        found["speed_up"] = {str(count): ratios[f"latency_{count}_ms"] for count in BATCHES}
        found |= {"dense": dense, "layers": subject.layers}
    return found


def record(subject: Subject) -> dict:
    """Which network it is, and what its file records: None for what it does not."""
    path, contents = subject.args.path, subject.contents
    known = {"checkpoint": str(path), "file_bytes": path.stat().st_size}
    known |= {"network": str(subject.network), **asdict(subject.network)}
    del known["cfg"]
    for name in ("epoch", "best_prec1"):
        value = contents.get(name)
        value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        known[name] = value if isinstance(value, int | float) else None
    return {**known, "pruned": subject.args.pruned, "device": str(subject.args.device)}


def measure(models: list[nn.Module], args: argparse.Namespace, pixels: int, counts: tuple) -> list:
    """For each network SIZES ("effective": without weights that are exactly zero; "bytes": of the
    weights on disk) and latency for each count of images."""
    found = []
    for model in models:
        parameters, flops = profiling.count_effective(model, pixels)
        plain = profiling.count_parameters(model), profiling.count_flops(model, pixels)
        sizes = (plain[0], parameters, plain[1], flops, profiling.count_bytes(model))
        found.append(dict(zip(SIZES, sizes, strict=True)))
    for count in counts:
        images = torch.zeros(count, 3, pixels, pixels, device=args.device)
        for each, seconds in zip(found, profiling.latencies(models, images), strict=True):
            each[f"latency_{count}_ms"] = 1e3 * seconds
    return found


def score(subject: Subject, part: str) -> dict:
    """Top-1 and loss on a part of the data set, not augmented. UserError if it cannot be had."""
    args, network, batch = subject.args, subject.network, subject.args.test_batch_size
    folder, pixels = Path(args.data or f"./data.{network.dataset}"), network.image_size
    kept = datasets.ON_DISK.get(network.dataset)
    if kept and not args.download and not (folder / kept).is_dir():
        raise UserError(
            f"{network.dataset} is not in {folder}: add --download, say with --data where it is, "
            "or ask for --flops or --compression alone"
        )
    loader = loading.batches(network.dataset, part, batch, args.device, pixels, args)
    loader.augment = False
    if isinstance(loader, Stream):  # which would still crop at random
        samples, classes, device = loader.pictures.samples, loader.classes, args.device
        loader = Stream(samples, classes, pixels, device, args.workers, batch, augment=False)
    told = subject.contents
    asked = None if told.get("classes") else args.num_classes  # the file knows better
    loading.check_classes(loader, network.num_classes, told, args.path, asked)
    return loop.test(subject.model, loader)._asdict()


def as_json(found: dict) -> str:
    """One object; null for NaN and infinity, which JSON does not have."""
    return json.dumps(json.loads(json.dumps(found), parse_constant=lambda _: None))


def as_text(found: dict) -> str:
    """Lines and tables for a person; neighbours of equal width share a row."""
    told = [name for name in LINES if name in found]
    best = found.get("best_prec1")
    found = {**found, "best": "unknown" if best is None else f"{best:.2%}"}
    if "dense" not in found:
        return "\n".join(LINES[name].format(**found) for name in told)
    lines = [LINES[name].format(**found) for name in told if name not in ("FLOPs", "compression")]
    rows = []
    for counts, group in itertools.groupby(found["layers"].items(), key=lambda item: item[1]):
        names = [name for name, _ in group]
        rows.append([" ... ".join(dict.fromkeys((names[0], names[-1]))), *map(str, counts)])
    lines += ["", tables.table(["layers", "channels", "dense"], rows), ""]
    rows = []
    for name, full in found["dense"].items():
        cells = [f"{round(value, 3):,}" for value in (found[name], full)]
        rows.append([name, *cells, f"{full / max(found[name], 1e-9):.2f}x"])
    lines.append(tables.table(["", "this", "dense", "dense / this"], rows))
    return "\n".join(lines)


if __name__ == "__main__":
    entry.run(main)
