"""Compare ways to win back accuracy without training: a pruned network as it is, with new BN
statistics, and with repaired weights.

    python main.py -sr --s 1e-4 --amp --arch resnet --depth 20 --epochs 8 --save logs/resnet
    python benchmarks/repair.py logs/resnet/model_best.pth.tar --ratio 0.4 --ratio 0.5
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure
from slimming import slicing
from slimming.choosing import ranking
from slimming.choosing.importance import MEASURES, Evidence
from slimming.choosing.moments import Gram, solve
from slimming.choosing.threshold import Choice, choose_channels
from slimming.cli import entry
from slimming.data import loading
from slimming.data.batches import Batches
from slimming.data.datasets import DataSettings
from slimming.data.image_folder import Stream
from slimming.measuring import figures
from slimming.repair import layer_by_layer, one_pass
from slimming.repair.one_pass import OnePass
from slimming.runtime.device import choose_device
from slimming.settings import fraction, plain_name
from slimming.slicing.prune import groups
from slimming.storage import architecture
from slimming.storage.architecture import Architecture
from slimming.training import loop

HEADER = ["network", "channels by", "pruned", "method", "top-1", "of the dense", "MFLOPs"]
HEADER += ["parameters", "images", "seconds"]
KEY = [*HEADER[:4], "images"]
WAYS = ("as pruned", "BN statistics", "channels only", "one pass", "layer by layer")
STRENGTH = 1e-3  # of the ridge, relative to the mean square of the inputs


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="checkpoint of a network trained by main.py")
    parser.add_argument("--data", help="folder of its dataset")
    parser.add_argument("--ratio", type=fraction, action="append", metavar="P")
    parser.add_argument("--measure", action="append", choices=["threshold", *MEASURES], metavar="M")
    parser.add_argument("--way", action="append", choices=WAYS, metavar="W", help="default: all")
    parser.add_argument(
        "--local", action="store_true", help="prune the same fraction of each layer, as run.py does"
    )
    parser.add_argument("--strength", type=float, help="of the ridge; default: the best held-back")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", type=plain_name, default="repair", help="of the results")
    parser.add_argument("--device")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    device = choose_device(args.device)
    model, network, loaders = opened(args.model, args.data, device, 256)
    trial = Trial(model, *loaders, args.images, args.seed)
    trial.local = args.local
    if args.strength:
        layer_by_layer.STRENGTHS = (args.strength,)
    for measured in args.measure or ["threshold"]:
        for ratio in args.ratio or [0.5]:
            for row in trial.rows(str(network), measured, ratio, args.way or WAYS):
                row["method"] += f", strength {args.strength:g}" if args.strength else ""
                rows = measure.merged(args.name, [row], KEY)
                measure.write(args.name, measure.machine(device), HEADER, rows)


def opened(
    path: Path, data: str | None, device: torch.device, batch: int
) -> tuple[nn.Module, Architecture, list[Batches | Stream]]:
    """The network of a checkpoint, and the training and test batches of its dataset."""
    model, network, _ = architecture.load(path)
    settings = DataSettings(data=data)
    loaders = [
        loading.batches_for(network, part, batch, device, settings) for part in ("train", "test")
    ]
    return model, network, loaders


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
        self.images, self.seed = training.draw(count, seed)[0], seed
        self.top1 = loop.test(model.to(test.device), test).prec1
        self.coupled = groups(model.cpu(), self.images[:1])
        self.scores: dict = {}
        self.local = False
        self.one_pass: OnePass | None = None

    def choose(self, measured: str, ratio: float) -> Choice:
        """The paper's threshold, or a ranking of the whole network by a measure."""
        if measured == "threshold":
            return choose_channels(self.model, ratio)
        if measured not in self.scores:
            labels = torch.zeros(len(self.images), dtype=torch.long)
            evidence = Evidence(self.model, [(self.images.cpu(), labels)])
            self.scores[measured] = MEASURES[measured](evidence)
        return ranking.choose(self.coupled, self.scores[measured], ratio, local=self.local)

    def rows(self, name: str, measured: str, ratio: float, ways: Sequence[str]) -> Iterator[dict]:
        choice = self.choose(measured, ratio)
        kept = slicing.kept_channels(self.coupled, choice.kept)
        slim = slicing.sliced(self.model, kept)
        flops = f"{figures.count_flops(slim) / 1e6:.1f}"
        parameters = f"{figures.count_parameters(slim):,}"
        for way in ways:
            began = time.perf_counter()
            repaired = self.by(way)(slim, kept)
            seconds = time.perf_counter() - began
            top1 = loop.test(repaired.to(self.test.device), self.test).prec1
            by = f"{measured} in each layer" if self.local else measured
            row = [name, by, f"{ratio:.0%}", way, f"{top1:.2%}", f"{top1 / self.top1:.1%}"]
            count = 0 if way == WAYS[0] else len(self.images)
            row += [flops, parameters, count, f"{seconds:.0f}"]
            yield dict(zip(HEADER, row, strict=True))

    def by(self, way: str) -> Callable[[nn.Module, slicing.Kept], nn.Module]:
        def closed_form(fit: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
            def repaired(slim: nn.Module, kept: slicing.Kept) -> nn.Module:
                self.one_pass = self.one_pass or OnePass(self.model, self.images.cpu())
                fitted = fit(slim, self.model, kept, self.one_pass.grams)
                return self.one_pass.recalibrated(fitted, kept)

            return repaired

        return {
            "as pruned": lambda slim, kept: slim,
            "BN statistics": lambda slim, kept: self.fit(slim, kept, weights=False),
            "channels only": closed_form(mix_channels),
            "one pass": closed_form(one_pass.refit),
            "layer by layer": self.fit,
        }[way]

    def fit(self, slim: nn.Module, kept: slicing.Kept, weights: bool = True) -> nn.Module:
        return layer_by_layer.repair(slim, self.model, kept, self.images, self.seed, weights).model


@torch.no_grad()
def mix_channels(
    slim: nn.Module, dense: nn.Module, kept: slicing.Kept, grams: Mapping[str, Gram]
) -> nn.Module:
    """A copy of ``slim`` in which each lost channel is replaced, in all places alike, by the linear
    combination of those that are left which is closest to it (GRAIL, 2602.23795)."""
    mixed = copy.deepcopy(slim).to(next(dense.parameters()).device)
    for layer, weight, gram, stays in one_pass.layers_to_fit(mixed, dense, kept, grams):
        taps = weight.shape[3]
        by_tap = gram.xx.unflatten(1, (-1, taps)).unflatten(3, (-1, taps))
        xx = by_tap.diagonal(dim1=2, dim2=4).sum(-1) / gram.count  # (groups, channels, channels)
        penalty = STRENGTH * xx.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        from_kept = xx[:, stays]
        mix = solve(from_kept[:, :, stays], penalty, from_kept[:, :, ~stays])
        more = torch.einsum("gkl,golt->gokt", mix, weight[:, :, ~stays])
        layer.weight += more.reshape(layer.weight.shape)
    return mixed


if __name__ == "__main__":
    entry.run(main)
