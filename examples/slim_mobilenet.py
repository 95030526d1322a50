"""Slim a MobileNetV2 that was trained on ImageNet: prune it, repair it on pictures without labels,
compare it with the dense network, and save it.

    python examples/slim_mobilenet.py --images photos --flops 0.8
    python examples/slim_mobilenet.py --images photos --weights mobilenet_v2-b0353104.pth
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

import slimming

WEIGHTS = MobileNet_V2_Weights.IMAGENET1K_V1
LEAST = 48  # pictures: slimming.repair needs 32


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    text = "folder of jpg pictures, without labels: two thirds calibrate, the rest compare"
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help=text)
    text = "file of torchvision's weights; `download` them, or `none`: random ones"
    parser.add_argument("--weights", default="download", help=text)
    text = "fraction of the FLOPs that stays"
    parser.add_argument("--flops", type=float, default=0.8, metavar="F", help=text)
    parser.add_argument("--size", type=int, default=224, help="side of the pictures, in pixels")
    parser.add_argument("--save", type=Path, default="slim-mobilenet.pth", help="file to write")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    dense = trained(args.weights)
    images = pictures(args.images, args.size)
    count = len(images) * 2 // 3
    calibration, held_out = images[:count], images[count:]

    slim = slimming.prune(dense, calibration[:8], flops=args.flops)
    repaired = slimming.repair(slim, dense, calibration)
    print(f"{slim.figures.parameters:,} parameters, {slim.figures.flops / 1e6:,.0f} MFLOPs")
    answers = top1(dense, held_out)
    for name, model in (("pruned", slim.model), ("repaired", repaired.model)):
        share = (top1(model, held_out) == answers).float().mean()
        print(f"{name}: the dense network's top-1 on {share:.1%} of {len(held_out)} pictures")

    slimming.save(repaired, args.save)
    again = slimming.load(args.save, build=mobilenet_v2)  # the weights come from the file
    same = torch.equal(top1(again, held_out), top1(repaired.model, held_out))
    print(f"saved {args.save}; loaded again, it gives {'the same' if same else 'other'} answers")


def trained(weights: str) -> torch.nn.Module:
    """The dense network, in eval mode."""
    if weights == "download":
        return mobilenet_v2(weights=WEIGHTS).eval()
    model = mobilenet_v2()
    if weights != "none":
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def pictures(folder: Path, size: int) -> torch.Tensor:
    """The pictures of a folder (N, 3, size, size), as these weights expect them."""
    files = sorted(folder.rglob("*.jpg"))
    if len(files) < LEAST:
        sys.exit(f"{folder} has {len(files)} jpg files: at least {LEAST} are needed")
    ready = WEIGHTS.transforms(crop_size=size, resize_size=size * 256 // 224)
    return torch.stack([ready(Image.open(path).convert("RGB")) for path in files])


def top1(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The class of each picture."""
    with torch.inference_mode():
        return torch.cat([model(batch).argmax(1) for batch in images.split(32)])


if __name__ == "__main__":
    main()
