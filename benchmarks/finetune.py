"""What is left of repair after fine-tuning, and does the curve of sweep.py tell the truth?

`starts` fine-tunes a pruned network from several starts: as pruned, with new BN statistics, and
repaired in each way. `rank` fine-tunes slim networks of several percentages and allocations, and
gives the rank correlation (Spearman's ρ) of their accuracy before and after.

    python benchmarks/finetune.py starts logs/resnet/model_best.pth.tar --ratio 0.5
    python benchmarks/finetune.py rank logs/resnet/model_best.pth.tar
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scipy.stats import spearmanr
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure
from benchmarks.repair import WAYS, Trial, opened
from slimming import slicing
from slimming.choosing.allocation import allocation_name
from slimming.cli import entry
from slimming.commands.sweep import run as sweep_subject
from slimming.commands.sweep.run import Candidate
from slimming.commands.sweep.settings import SweepRun
from slimming.data import loading
from slimming.data.batches import Batches, Split, balanced
from slimming.measuring import figures
from slimming.runtime.device import choose_device
from slimming.settings import build, fraction, plain_name
from slimming.storage.architecture import Architecture
from slimming.training import loop
from slimming.training.settings import TrainSettings
from slimming.training.trainer import Trainer

STARTS = ["network", "pruned", "start", "lr", "seed", "before", "first epoch", "half", "last epoch"]
RANK = ["network", "allocation", "pruned", "MFLOPs", "repaired", "on test", "fine-tuned"]
RATIOS = (0.3, 0.45, 0.6, 0.75)
ALLOCATIONS = ("global", "uniform", "lamp")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("starts", "rank"))
    parser.add_argument("model", type=Path, help="checkpoint of a network trained by main.py")
    parser.add_argument("--data", help="folder of its dataset")
    parser.add_argument("--ratio", type=fraction, action="append", metavar="P")
    parser.add_argument("--way", action="append", choices=WAYS, metavar="W", help="default: all")
    parser.add_argument("--allocation", action="append", type=allocation_name, metavar="A")
    parser.add_argument("--epochs", type=int, help="default: 4")
    text = "number of training images of an epoch, equally many of each class (default: all)"
    parser.add_argument("--train-images", type=int, default=10**9, metavar="N", help=text)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--name", type=plain_name, help="of the results (default: the study)")
    parser.add_argument("--device")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    args.name = args.name or f"finetune-{args.study}"
    {"starts": starts, "rank": rank}[args.study](args)


def starts(args: argparse.Namespace) -> None:
    """Fine-tune from each start, with some seeds."""
    device = choose_device(args.device)
    model, network, loaders = opened(args.model, args.data, device, 64)
    trial = Trial(model, *loaders, 2048, 0)
    loaders[0] = some(loaders[0], args.train_images)
    for ratio in args.ratio or [0.5]:
        choice = trial.choose("threshold", ratio)
        kept = slicing.kept_channels(trial.coupled, choice.kept)
        slim = slicing.sliced(model, kept)
        for way in args.way or WAYS:
            begun = trial.by(way)(slim, kept).to(device)
            before = loop.test(begun, loaders[1]).prec1
            for seed in range(1, args.seeds + 1):
                tops = tuned(begun, network, loaders, args.epochs or 4, seed, args.lr)
                row = [str(network), f"{ratio:.0%}", way, args.lr, seed]
                for top1 in (before, tops[0], tops[len(tops) // 2 - 1], tops[-1]):
                    row.append(f"{top1:.2%}")
                rows = [dict(zip(STARTS, row, strict=True))]
                rows = measure.merged(args.name, rows, STARTS[:5])
                measure.write(args.name, measure.machine(device), STARTS, rows)


def rank(args: argparse.Namespace) -> None:
    """Fine-tune the points of a sweep, and correlate."""
    typed = {"checkpoint": str(args.model), "data": args.data, "device": args.device}
    subject = sweep_subject.load(build(SweepRun, {**typed, "save": str(ROOT / "logs" / "none")}))
    network, device, rows = subject.network, subject.test.device, []
    train = loading.batches_for(network, "train", 64, device, subject.run.data)
    train = some(train, args.train_images)
    for ratio in args.ratio or RATIOS:
        for name in args.allocation or ALLOCATIONS:
            _, slim, kept = subject.slim(Candidate(name, ratio))
            repaired = subject.one_pass.repaired(slim, kept).to(device)
            held_back, test = subject.top1(repaired), loop.test(repaired, subject.test).prec1
            *_, after = tuned(
                repaired, network, (train, subject.test), args.epochs or 4, 1, args.lr
            )
            flops = f"{figures.count_flops(slim, network.image_size) / 1e6:.1f}"
            row = [str(network), name, f"{ratio:.0%}", flops]
            row += [f"{top1:.2%}" for top1 in (held_back, test, after)]
            rows = measure.merged(args.name, [dict(zip(RANK, row, strict=True))], RANK[:3])
            pairs = [[float(row[column].rstrip("%")) for row in rows] for column in RANK[4::2]]
            note = f"Spearman's ρ of repaired and fine-tuned, {len(rows)} networks: "
            note += f"{spearmanr(*pairs).statistic:.3f}" if len(rows) > 2 else "-"
            measure.write(args.name, measure.machine(device), RANK, rows, note)


def some(loader: Batches, count: int) -> Batches:
    """The batches of so many of the images."""
    images, labels, classes = loader.split
    chosen = balanced(labels, count, seed=0).to(images.device)
    return replace(loader, split=Split(images[chosen], labels[chosen], classes))


def tuned(
    model: nn.Module, network: Architecture, loaders: Sequence, epochs: int, seed: int, lr: float
) -> list[float]:
    """The test accuracy after each epoch of fine-tuning a copy of the network, with a constant
    learning rate."""
    settings = TrainSettings(epochs=epochs, seed=seed, lr=lr, amp=True, log_interval=10**6)
    train = loaders[0]
    train.seed = seed
    slim = replace(network, cfg=slicing.cfg_of(model))
    begun = slicing.sliced(model, {})
    trainer = Trainer(begun, slim, train, loaders[1], settings, schedule=lambda epoch: lr)
    trainer.fit()
    return [record["test_prec1"] for record in trainer.history]


if __name__ == "__main__":
    entry.run(main)
