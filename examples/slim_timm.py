"""Slim a backbone of timm on a folder of pictures: fine-tune the pretrained network with the
sparsity penalty, prune, repair, and fine-tune again.

    pip install timm
    python examples/slim_timm.py --data photos --model resnet18 --epochs 10

``--data`` has one folder for each class. `--random` starts from random weights.
"""

import argparse
from pathlib import Path

import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder

import slimming


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--model", default="resnet18", help="of timm")
    parser.add_argument("--random", action="store_true", help="do not download weights")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures, in pixels")
    parser.add_argument("--epochs", type=int, default=10, help="with the penalty")
    parser.add_argument("--tune", type=int, default=5, help="epochs of fine-tuning")
    parser.add_argument("--s", type=float, default=1e-4, help="strength of the penalty")
    parser.add_argument("--flops", type=float, default=0.5, help="fraction of FLOPs that stays")
    parser.add_argument("--save", default="slim-timm.pth", help="file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    classes = len(ImageFolder(args.data).classes)

    def build(pretrained: bool = False) -> torch.nn.Module:
        return timm.create_model(args.model, pretrained=pretrained, num_classes=classes)

    dense = build(pretrained=not args.random)
    ready = timm.data.create_transform(
        **{**timm.data.resolve_model_data_config(dense), "input_size": (3, args.size, args.size)}
    )
    parts = random_split(ImageFolder(args.data, ready), [0.8, 0.2])
    training, test = (DataLoader(part, 32, shuffle=part is parts[0]) for part in parts)
    images = torch.stack([parts[0][i][0] for i in range(min(256, len(parts[0])))])

    sparsity = slimming.Sparsity(dense, images[:1], s=args.s)
    train(dense, training, args.epochs, 0.02, sparsity)
    print(sparsity.summary())
    pruned = slimming.prune(dense, images[:8], flops=args.flops, measure="lamp")
    repaired = slimming.repair(pruned, dense, images)
    slimming.save(repaired, args.save)
    tuned = slimming.load(args.save, build)
    train(tuned, training, args.tune, 0.005)
    slimming.save(tuned, args.save)

    stages = {"dense": dense, "pruned": pruned.model, "repaired": repaired.model}
    stages["fine-tuned"] = tuned
    scores = {name: top1(model, test) for name, model in stages.items()}
    print(slimming.compare(stages, images[:16], top1=scores))
    print(f"saved {args.save}")


def train(
    model: torch.nn.Module,
    loader: DataLoader,
    epochs: int,
    lr: float,
    sparsity: slimming.Sparsity | None = None,
) -> None:
    """SGD with a cosine schedule, with the penalty of ``sparsity``."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))
    handles = sparsity.attach(optimizer) if sparsity else []
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for images, labels in loader:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(loader)
        schedule.step()
        print(f"epoch {epoch}: loss {total:.4f}", flush=True)
    for handle in handles:
        handle.remove()
    model.eval()


@torch.no_grad()
def top1(model: torch.nn.Module, loader: DataLoader) -> float:
    """The fraction of pictures whose class is found."""
    right = [model.eval()(images).argmax(1) == labels for images, labels in loader]
    return float(torch.cat(right).float().mean())


if __name__ == "__main__":
    main()
