"""Compare ways to win back accuracy without training: a pruned network as it is, with new BN
statistics, and with repaired weights.

    python main.py -sr --s 1e-4 --amp --arch resnet --depth 20 --epochs 8 --save logs/resnet
    python benchmarks/repair.py logs/resnet/model_best.pth.tar --ratio 0.4 --ratio 0.5
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure
from slimming.cli import entry
from slimming.data import loading
from slimming.data.batches import Batches
from slimming.data.settings import DataSettings
from slimming.data.stream import Stream
from slimming.measuring import profiling
from slimming.pruning import one_pass, ranking, repair, slicing
from slimming.pruning.choice import Choice
from slimming.pruning.groups import groups
from slimming.pruning.importance import MEASURES, Evidence
from slimming.pruning.threshold import choose_channels
from slimming.runtime.device import choose_device
from slimming.settings import fraction, plain_name
from slimming.storage import architecture
from slimming.training import loop

HEADER = ["network", "channels by", "pruned", "method", "top-1", "of the dense", "MFLOPs"]
HEADER += ["parameters", "images", "seconds"]
WAYS = ("as pruned", "BN statistics", "one pass", "layer by layer")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="checkpoint of a network trained by main.py")
    parser.add_argument("--data", help="folder of its dataset")
    parser.add_argument("--ratio", type=fraction, action="append", metavar="P")
    parser.add_argument("--measure", action="append", choices=["threshold", *MEASURES], metavar="M")
    parser.add_argument("--way", action="append", choices=WAYS, metavar="W", help="default: all")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", type=plain_name, default="repair", help="of the results")
    parser.add_argument("--device")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device = choose_device(args.device)
    model, network, _ = architecture.load(args.model)
    settings = DataSettings(data=args.data)
    loaders = [
        loading.batches(network.dataset, part, 256, device, network.image_size, settings)
        for part in ("train", "test")
    ]
    trial = Trial(model, *loaders, args.images, args.seed)
    for measured in args.measure or ["threshold"]:
        for ratio in args.ratio or [0.5]:
            for row in trial.rows(str(network), measured, ratio, args.way or WAYS):
                rows = measure.merged(args.name, [row], HEADER[:4])
                measure.write(args.name, measure.machine(device), HEADER, rows)


class Trial:
    """A dense network, and the images that its slim ones are repaired and tested on."""

    def __init__(
        self,
        model: nn.Module,
        training: Batches | Stream,
        test: Batches | Stream,
        count: int,
        seed: int,
    ):
        self.model, self.training, self.test = model, training, test
        self.images, self.seed = training.draw(count, seed), seed
        self.top1 = loop.test(model.to(test.device), test).prec1
        self.coupled = groups(model.cpu(), self.images[:1])
        self.scores: dict = {}
        self.grams = None

    def choose(self, measured: str, ratio: float) -> Choice:
        """The paper's threshold, or a ranking of the whole network by a measure."""
        if measured == "threshold":
            return choose_channels(self.model, ratio)
        if measured not in self.scores:
            labels = torch.zeros(len(self.images), dtype=torch.long)
            evidence = Evidence(self.model, [(self.images.cpu(), labels)])
            self.scores[measured] = MEASURES[measured](evidence)
        return ranking.choose(self.coupled, self.scores[measured], ratio)

    def rows(self, name: str, measured: str, ratio: float, ways: Sequence[str]) -> Iterator[dict]:
        choice = self.choose(measured, ratio)
        kept = slicing.kept_channels(self.model, self.coupled, choice.keep)
        slim = slicing.sliced(self.model, kept)
        flops = f"{profiling.count_flops(slim) / 1e6:.1f}"
        parameters = f"{profiling.count_parameters(slim):,}"
        for way in ways:
            began = time.perf_counter()
            repaired = self.by(way)(slim, kept)
            seconds = time.perf_counter() - began
            top1 = loop.test(repaired.to(self.test.device), self.test).prec1
            row = [name, measured, f"{ratio:.0%}", way, f"{top1:.2%}", f"{top1 / self.top1:.1%}"]
            count = 0 if way == WAYS[0] else len(self.images)
            row += [flops, parameters, count, f"{seconds:.0f}"]
            yield dict(zip(HEADER, row, strict=True))

    def by(self, way: str) -> Callable[[nn.Module, slicing.Kept], nn.Module]:
        def closed_form(slim: nn.Module, kept: slicing.Kept) -> nn.Module:
            self.grams = self.grams or one_pass.input_grams(self.model, self.images.cpu())
            fitted = one_pass.refit(slim, self.model, kept, self.grams)
            return self.fit(fitted, kept, weights=False)

        return {
            "as pruned": lambda slim, kept: slim,
            "BN statistics": lambda slim, kept: self.fit(slim, kept, weights=False),
            "one pass": closed_form,
            "layer by layer": self.fit,
        }[way]

    def fit(self, slim: nn.Module, kept: slicing.Kept, weights: bool = True) -> nn.Module:
        return repair.repair(slim, self.model, kept, self.images, self.seed, weights).model


if __name__ == "__main__":
    entry.run(main)
