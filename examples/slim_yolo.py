"""Slim a detector of Ultralytics with its own trainer: train with the sparsity penalty, prune,
repair, fine-tune, validate, and export to ONNX.

    pip install ultralytics onnx  # Ultralytics is licensed under AGPL-3.0, or commercially
    python examples/slim_yolo.py --model yolov8n.yaml --data shapes --images 2000 --epochs 30

``--data`` is a dataset's YAML file, or `shapes`: pictures of rectangles, ellipses and triangles
that are drawn into ``--folder``. ``--model`` may be a trained ``.pt`` file, too.
"""

import argparse
import copy
import random
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import slimming

NAMES = ["rectangle", "ellipse", "triangle"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="yolov8n.yaml", help="YAML of a network, or a .pt file")
    parser.add_argument("--data", default="shapes", help="YAML of a dataset, or shapes")
    parser.add_argument("--folder", type=Path, default=Path("runs/slim"), help="for all results")
    parser.add_argument("--images", type=int, default=2000, help="of shapes, to draw")
    parser.add_argument("--size", type=int, default=160, help="side of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=30, help="with the penalty")
    parser.add_argument("--tune", type=int, default=5, help="epochs of fine-tuning")
    parser.add_argument("--s", type=float, default=1e-3, help="strength of the penalty")
    parser.add_argument("--flops", type=float, default=0.5, help="fraction of FLOPs that stays")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = args.data if args.data != "shapes" else draw(args.folder / "shapes", args.images)
    more = {"data": str(data), "imgsz": args.size, "project": str(args.folder.resolve())}
    more |= {"seed": args.seed, "plots": False, "exist_ok": True, "val": False, "workers": 0}

    yolo = YOLO(args.model)
    yolo.add_callback("on_train_start", partial(sparsify, args.s, args.size))
    yolo.train(name="sparse", epochs=args.epochs, **more)
    dense = yolo.model.float().eval()

    images = pictures(yolo.trainer)
    only_detections(dense, True)
    pruned = slimming.prune(dense, images[:2], flops=args.flops, measure="bn")
    repaired = slimming.repair(pruned, dense, images)
    for model in (dense, pruned.model, repaired.model):
        only_detections(model, False)

    tuned = YOLO(args.model)
    tuned.model, tuned.ckpt = copy.deepcopy(repaired.model), {"slim": True}
    tuned.train(trainer=keeping(tuned.model), name="tuned", epochs=args.tune, lr0=1e-3, **more)
    again = YOLO(tuned.trainer.last)  # a file of theirs, of the slim network

    stages = {"dense": dense, "pruned": pruned.model, "repaired": repaired.model}
    stages["fine-tuned"] = again.model.float()
    scores = {name: score(model, args.model, more) for name, model in stages.items()}
    print(slimming.compare(stages, images[:8], **{"mAP50-95": scores}))
    print("exported", again.export(format="onnx", imgsz=args.size))


def sparsify(s: float, size: int, trainer: DetectionTrainer) -> None:
    """Before the first step: each step of the optimizer adds the penalty."""
    image = torch.rand(1, 3, size, size, device=trainer.device)
    only_detections(trainer.model, True)
    slimming.Sparsity(trainer.model, image, s=s).attach(trainer.optimizer)
    only_detections(trainer.model, False)


def only_detections(model: torch.nn.Module, only: bool) -> None:
    """Whether the network returns nothing but detections. Else it returns the maps of its neck,
    too, whose channels then all count as outputs and stay."""
    model.model[-1].export = only


def keeping(slim: torch.nn.Module) -> type[DetectionTrainer]:
    """Their trainer, for a network that is there: it would build it from its YAML again."""

    class Trainer(DetectionTrainer):
        def get_model(self, *_: object, **__: object) -> torch.nn.Module:
            return slim

    return Trainer


def score(model: torch.nn.Module, name: str, more: dict) -> float:
    """The mAP50-95 by their validator, on a copy: it fuses BatchNorm."""
    yolo = YOLO(name)
    yolo.model = copy.deepcopy(model)
    return float(yolo.val(name="val", **{k: more[k] for k in ("data", "imgsz", "project")}).box.map)


def pictures(trainer: DetectionTrainer, count: int = 256) -> torch.Tensor:
    """Training images (N, 3, H, W) as the validator shows them, with the bars beside them: what
    calibration does not see, repair does not keep."""
    loader = trainer.get_dataloader(trainer.data["train"], count, rank=-1, mode="val")
    return next(iter(loader))["img"].float() / 255


def draw(folder: Path, count: int, size: int = 160) -> Path:
    """A dataset in their format: one to five shapes in each picture, four in five to train on."""
    dice = random.Random(0)
    for number in range(count):
        part = "val" if number % 5 == 4 else "train"
        image = Image.new("RGB", (size, size), tuple(dice.choices(range(256), k=3)))
        lines = []
        for _ in range(dice.randint(1, 5)):
            width, height = dice.randint(16, 64), dice.randint(16, 64)
            x, y = dice.randint(0, size - width), dice.randint(0, size - height)
            name, box = dice.randrange(3), (x, y, x + width, y + height)
            pen, color = ImageDraw.Draw(image), tuple(dice.choices(range(256), k=3))
            if name == 2:
                pen.polygon([(x, y + height), (x + width, y + height), (x + width // 2, y)], color)
            else:
                (pen.ellipse if name else pen.rectangle)(box, color)
            center = (x + width / 2) / size, (y + height / 2) / size
            lines.append(f"{name} {center[0]} {center[1]} {width / size} {height / size}")
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        image.save(folder / "images" / part / f"{number}.png")
        (folder / "labels" / part / f"{number}.txt").write_text("\n".join(lines))
    text = f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames: {NAMES}\n"
    (folder / "shapes.yaml").write_text(text)
    return folder / "shapes.yaml"


if __name__ == "__main__":
    main()
