"""Which measure and which scope are safe by default: slim networks of many kinds by each.

A slim network may be equal to the masked one and still be constant: one layer has lost nearly all
of its channels. Each network is pruned as trained on digits (a minute) or as initialised, by each
measure in each scope. Liveness is the spread of its outputs over images against those of the dense
network; top-1 is that of the trained ones, as pruned and with new BatchNorm statistics (no
training).

    python benchmarks/defaults.py
"""

import argparse
import copy
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure
from models import NETWORKS
from slimming import slicing
from slimming.channels.groups import Group
from slimming.channels.scaling import batch_norms
from slimming.choosing import importance, ranking
from slimming.choosing.importance import Evidence, Scores, layers
from slimming.cli import entry
from slimming.data import loading
from slimming.data.datasets import DataSettings
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.slicing.proof import FAINT, liveness
from slimming.slicing.prune import groups

RATIOS = (0.5, 0.7)
LEAST = 0.1
PIXELS = 32
EPOCHS = 4
HEADER = ["scope", "measure", "least", "ratio", "networks", "dead", "lowest liveness"]
HEADER += ["median liveness", "top-1, dense", "top-1, pruned", "top-1, new BN", "FLOPs left"]


class UNet(nn.Module):
    """Two scales, with concatenations: one output of the size of the image."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.first, self.second = _conv(3, width), _conv(width, 2 * width)
        self.middle = _conv(2 * width, 4 * width)
        self.third, self.fourth = _conv(6 * width, 2 * width), _conv(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        c = F.interpolate(self.middle(F.max_pool2d(b, 2)), scale_factor=2)
        d = F.interpolate(self.third(torch.cat([b, c], 1)), scale_factor=2)
        return self.head(self.fourth(torch.cat([a, d], 1)))


def _conv(reads: int, writes: int) -> nn.Sequential:
    conv = nn.Conv2d(reads, writes, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(writes), nn.ReLU())


def plain() -> nn.Module:
    """A network without BatchNorm."""
    widths, parts = [3, 16, 32, 64, 128], []
    for reads, writes in itertools.pairwise(widths):
        parts += [nn.Conv2d(reads, writes, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(128 * 4, 64), nn.ReLU(), nn.Linear(64, 10))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=10)


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "VGG-11": lambda: NETWORKS["vgg"](
        depth=11, cfg=[16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128], num_classes=10
    ),
    "ResNet-11": lambda: NETWORKS["resnet"](depth=11, num_classes=10),
    "DenseNet-7": lambda: NETWORKS["densenet"](depth=7, num_classes=10),
    "ResNet-18": _torchvision("resnet18"),
    "plain": plain,
    "U-Net": UNet,
}
NAMES = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"]
NAMES += ["regnet_y_400mf", "squeezenet1_1", "mnasnet0_5"]
INITIALISED = {name: _torchvision(name) for name in NAMES} | {"plain": plain, "U-Net": UNet}


def l1_mean(e: Evidence) -> Scores:
    """The mean of |θ|."""
    sizes = {n: layer.weight[0].numel() for n, layer in layers(e.model).items()}
    return {n: s / sizes[n] for n, s in importance.l1(e).items() if n in sizes}


def l1_relative(e: Evidence) -> Scores:
    """‖θ‖₁, divided by its mean over the layer."""
    return {n: s / s.mean() for n, s in importance.l1(e).items()}


MEASURES: dict[str, Callable[[Evidence], Scores]] = {
    **{name: importance.MEASURES[name] for name in ("l1", "mag_based", "bn", "lamp")},
    **{"l1 mean": l1_mean, "l1 relative": l1_relative, "random": importance.random},
}
WAYS = [(m, "global", 0.0) for m in ("l1", "bn", "lamp")]
WAYS += [(m, "global", LEAST) for m in MEASURES]
WAYS += [(m, "layer", LEAST) for m in ("l1", "mag_based", "bn", "random")]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two networks, one epoch")
    return parser


def main() -> None:
    rows = table(make_parser().parse_args().quick)
    notes = (
        f"Dead: liveness below {FAINT}. Means of top-1 and FLOPs are over the trained networks. "
    )
    notes += "Networks that a measure cannot score are left out."
    measure.write("defaults-cpu", measure.machine(torch.device("cpu")), HEADER, rows, notes)


def table(quick: bool) -> list[dict[str, Any]]:
    """A row for each way and ratio."""
    data = {part: _digits(part) for part in ("train", "test")}
    found: dict[tuple, list[dict[str, float]]] = {}
    few = {"plain": plain, "U-Net": UNet}
    for kind, networks in (("trained", TRAINED), ("initialised", INITIALISED)):
        for name, build in (few if quick else networks).items():
            torch.manual_seed(0)
            model = build()
            if kind == "trained":
                train(model, *data["train"], 1 if quick else EPOCHS)
            for key, result in results(model.eval(), data, kind == "trained").items():
                found.setdefault(key, []).append(result)
            print(f"{kind} {name}", flush=True)
    return [_row(*key, several) for key, several in found.items()]


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """A few epochs of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(32)[:-1]:
            outputs = model(images[rows])
            loss = (
                F.cross_entropy(outputs, labels[rows])
                if outputs.dim() == 2
                else F.binary_cross_entropy_with_logits(outputs, _drawn(images[rows]).float())
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def results(
    model: nn.Module, data: dict[str, tuple[torch.Tensor, torch.Tensor]], trained: bool
) -> dict[tuple, dict[str, float]]:
    """For each way and ratio what is left of the network."""
    images = data["test"][0][:32]
    coupled, evidence, found = groups(model, images), Evidence(model, []), {}
    flops, dense = figures.count_flops(model, PIXELS), score(model, *data["test"])
    for way in WAYS:
        for ratio in RATIOS:
            try:
                slim = pruned(model, coupled, evidence, way, ratio)
            except UserError:  # without BatchNorm
                continue
            result = {"liveness": liveness(slim, model, images) or 0.0}
            if trained:
                result |= {"dense": dense, "pruned": score(slim, *data["test"])}
                result["flops"] = figures.count_flops(slim, PIXELS) / flops
                result["new"] = score(_recalibrated(slim, data["train"][0]), *data["test"])
            found[(*way, ratio)] = result
    return found


def pruned(
    model: nn.Module, coupled: list[Group], evidence: Evidence, way: tuple, ratio: float
) -> nn.Module:
    name, scope, least = way
    scores = MEASURES[name](evidence)
    choice = ranking.choose(coupled, scores, ratio, local=scope == "layer", least=least)
    return slicing.sliced(model, slicing.kept_channels(coupled, choice.kept))


@torch.no_grad()
def score(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The fraction of the images, or of the pixels, that are right."""
    outputs = model.eval()(images)
    if outputs.dim() == 2:
        return float((outputs.argmax(1) == labels).float().mean())
    return float(((outputs > 0) == _drawn(images)).float().mean())


@torch.no_grad()
def _recalibrated(slim: nn.Module, images: torch.Tensor) -> nn.Module:
    """A copy with the BatchNorm statistics of some images."""
    slim = copy.deepcopy(slim)
    for norm in batch_norms(slim).values():
        norm.reset_running_stats()
        norm.momentum = None
    slim.train()(images[:64])
    return slim


def _drawn(images: torch.Tensor) -> torch.Tensor:
    """Which pixels belong to the digit."""
    return images.mean(1, keepdim=True) > 0


def _digits(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    device, size = torch.device("cpu"), 256
    loader = loading.batches("digits", part, size, device, PIXELS, DataSettings())
    return loader.draw(512 if part == "train" else 128, 0)


def _row(
    name: str, scope: str, least: float, ratio: float, several: list[dict[str, float]]
) -> dict[str, Any]:
    alive = [result["liveness"] for result in several]
    trained = [result for result in several if "dense" in result]

    def mean(key: str) -> str:
        return f"{statistics.mean(result[key] for result in trained):.1%}"

    cells = [scope, name, least, ratio, len(several), sum(value < FAINT for value in alive)]
    cells += [f"{min(alive):.1e}", f"{statistics.median(alive):.2f}"]
    cells += [mean("dense"), mean("pruned"), mean("new"), mean("flops")]
    return dict(zip(HEADER, cells, strict=True))


if __name__ == "__main__":
    entry.run(main)
