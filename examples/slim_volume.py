"""Slim a 3d network of MONAI for volumes: a U-Net that finds a ball in noise.

pip install monai
python examples/slim_volume.py --volumes 200 --epochs 10
"""

import argparse

import torch
from monai.losses import DiceLoss
from monai.networks.nets import BasicUNet

import slimming


def build() -> torch.nn.Module:
    """The dense network: volumes (N, 1, D, H, W) to logits of the same size."""
    return BasicUNet(3, 1, 1, features=(16, 16, 32, 64, 128, 16), norm="batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=200, help="to draw; one in five tests")
    parser.add_argument("--size", type=int, default=32, help="side of the volumes")
    parser.add_argument("--epochs", type=int, default=10, help="with the penalty")
    parser.add_argument("--tune", type=int, default=3, help="epochs of fine-tuning")
    parser.add_argument("--s", type=float, default=1e-3, help="strength of the penalty")
    parser.add_argument("--flops", type=float, default=0.5, help="fraction of FLOPs that stays")
    parser.add_argument("--save", default="slim-volume.pth", help="file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    volumes, masks = draw(args.volumes, args.size)
    count = len(volumes) * 4 // 5

    dense = build()
    sparsity = slimming.Sparsity(dense, volumes[:1], s=args.s)
    train(dense, volumes[:count], masks[:count], args.epochs, 3e-3, sparsity)
    pruned = slimming.prune(dense, volumes[:4], flops=args.flops, measure="bn")
    repaired = slimming.repair(pruned, dense, volumes[:count])
    slimming.save(repaired, args.save)
    tuned = slimming.load(args.save, build)
    train(tuned, volumes[:count], masks[:count], args.tune, 1e-3)
    slimming.save(tuned, args.save)

    stages = {"dense": dense, "pruned": pruned.model, "repaired": repaired.model}
    stages["fine-tuned"] = tuned
    scores = {name: dice(m, volumes[count:], masks[count:]) for name, m in stages.items()}
    print(slimming.compare(stages, volumes[:4], Dice=scores))
    print(f"saved {args.save}")


def train(
    model: torch.nn.Module,
    volumes: torch.Tensor,
    masks: torch.Tensor,
    epochs: int,
    lr: float,
    sparsity: slimming.Sparsity | None = None,
) -> None:
    """Adam and the Dice loss, with the penalty of ``sparsity``."""
    criterion, optimizer = DiceLoss(sigmoid=True), torch.optim.Adam(model.parameters(), lr)
    handles = sparsity.attach(optimizer) if sparsity else []
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(volumes)).split(4):
            loss = criterion(model(volumes[rows]), masks[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch}: loss {total / len(volumes):.4f}", flush=True)
    for handle in handles:
        handle.remove()
    model.eval()


@torch.no_grad()
def dice(model: torch.nn.Module, volumes: torch.Tensor, masks: torch.Tensor) -> float:
    """2 |A ∩ B| / (|A| + |B|)."""
    found = torch.cat([model.eval()(few) > 0 for few in volumes.split(4)])
    return float(2 * (found & (masks > 0)).sum() / (found.sum() + masks.sum()))


def draw(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Volumes (count, 1, size, size, size) of a ball in noise, and its mask."""
    center = size * (0.25 + torch.rand(count, 3, 1, 1, 1) / 2)
    radius = size * (0.15 + torch.rand(count, 1, 1, 1) / 8)
    line = torch.arange(size).float()
    away = [line[:, None, None] - center[:, 0], line[:, None] - center[:, 1], line - center[:, 2]]
    masks = (sum(part.square() for part in away) < radius.square())[:, None].float()
    return torch.rand(count, 1, size, size, size) + 0.5 * masks, masks


if __name__ == "__main__":
    main()
