"""Slim a U-Net of segmentation_models_pytorch in a training loop of one's own: train with the
sparsity penalty, prune, repair, fine-tune with the dense network as the teacher.

    pip install segmentation-models-pytorch
    python examples/slim_unet.py --encoder resnet18 --images 1000 --epochs 10

The data are drawn: an ellipse on noise, to be found in each picture.
"""

import argparse
from collections.abc import Callable

import segmentation_models_pytorch as smp
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import slimming


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="resnet18", help="of segmentation_models_pytorch")
    parser.add_argument("--images", type=int, default=1000, help="to draw; one in five tests")
    parser.add_argument("--size", type=int, default=64, help="side of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=10, help="with the penalty")
    parser.add_argument("--tune", type=int, default=3, help="epochs of fine-tuning")
    parser.add_argument("--s", type=float, default=1e-3, help="strength of the penalty")
    parser.add_argument("--flops", type=float, default=0.5, help="fraction of FLOPs that stays")
    parser.add_argument("--save", default="slim-unet.pth", help="file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, masks = draw(args.images, args.size)
    count = len(images) * 4 // 5

    def build() -> torch.nn.Module:
        return smp.Unet(args.encoder, encoder_weights=None)

    dense = build()
    sparsity = slimming.Sparsity(dense, images[:1], s=args.s)
    train(dense, images[:count], masks[:count], args.epochs, 1e-3, sparsity=sparsity)
    print(sparsity.summary())

    dense.eval()
    pruned = slimming.prune(dense, images[:8], flops=args.flops, measure="bn")
    repaired = slimming.repair(pruned, dense, images[:count][:512])
    slimming.save(repaired, args.save)
    tuned = slimming.load(args.save, build)
    teacher = slimming.distill(tuned, dense)
    train(tuned, images[:count], masks[:count], args.tune, 1e-4, teacher=teacher)
    slimming.save(tuned, args.save)

    stages = {"dense": dense, "pruned": pruned.model, "repaired": repaired.model}
    stages["fine-tuned"] = tuned
    scores = {name: overlap(m, images[count:], masks[count:]) for name, m in stages.items()}
    print(slimming.compare(stages, images[:8], IoU=scores))
    print(f"saved {args.save}")


def train(
    model: torch.nn.Module,
    images: torch.Tensor,
    masks: torch.Tensor,
    epochs: int,
    lr: float,
    sparsity: slimming.Sparsity | None = None,
    teacher: Callable[..., torch.Tensor] | None = None,
) -> None:
    """Adam and cross entropy, with the penalty of ``sparsity`` and the loss of the ``teacher``."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images)).split(16):
            outputs = model(images[rows])
            loss = cross_entropy(outputs, masks[rows])
            if teacher:
                loss = loss + teacher(images[rows], outputs)
            optimizer.zero_grad()
            loss.backward()
            if sparsity:
                sparsity.on_gradients()
            optimizer.step()
            if sparsity:
                sparsity.after_step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch}: loss {total / len(images):.4f}", flush=True)
    model.eval()


@torch.no_grad()
def overlap(model: torch.nn.Module, images: torch.Tensor, masks: torch.Tensor) -> float:
    """Intersection over union."""
    found = torch.cat([model.eval()(few) > 0 for few in images.split(32)])
    return float((found & (masks > 0)).sum() / (found | (masks > 0)).sum())


def draw(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (count, 3, size, size) of an ellipse on noise; masks (count, 1, size, size)."""
    center = size * (0.25 + torch.rand(count, 2, 1, 1) / 2)
    radii = size * (0.1 + torch.rand(count, 2, 1, 1) / 5)
    line = torch.arange(size).float()
    down, right = line[:, None] - center[:, :1], line - center[:, 1:]
    inside = (down / radii[:, :1]).square() + (right / radii[:, 1:]).square() < 1
    masks = inside.float()
    return torch.rand(count, 3, size, size) + masks * torch.rand(count, 3, 1, 1), masks


if __name__ == "__main__":
    main()
