"""Slim inside Lightning: a callback adds the sparsity penalty, and the slim network goes back into
the module and is fine-tuned by a Trainer.

    pip install lightning
    python examples/slim_lightning.py --data photos --epochs 20

``--data`` is a folder of pictures, one folder for each class; without it scikit-learn's digits.
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

import slimming


class Classifier(pl.LightningModule):
    """A network, trained with SGD and cross entropy."""

    def __init__(self, network: torch.nn.Module, lr: float):
        super().__init__()
        self.network, self.lr = network, lr

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("top1", right, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)


class Sparsify(pl.Callback):
    """The penalty in each step of the optimizer, and its state in checkpoints."""

    def __init__(self, sparsity: slimming.Sparsity):
        self.sparsity = sparsity

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.sparsity.attach(trainer.optimizers[0])

    def state_dict(self) -> dict:
        return self.sparsity.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.sparsity.load_state_dict(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of pictures; default: digits")
    parser.add_argument("--epochs", type=int, default=20, help="with the penalty")
    parser.add_argument("--tune", type=int, default=5, help="epochs of fine-tuning")
    parser.add_argument("--s", type=float, default=1e-3, help="strength of the penalty")
    parser.add_argument("--flops", type=float, default=0.5, help="fraction of FLOPs that stays")
    parser.add_argument("--save", default="slim-lightning.pth", help="file to write")
    args = parser.parse_args()
    pl.seed_everything(0)
    parts, classes = data(args.data)
    training, test = (DataLoader(part, 64, shuffle=part is parts[0]) for part in parts)
    images = torch.stack([parts[0][i][0] for i in range(min(512, len(parts[0])))])

    def trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
        more = {"logger": False, "enable_checkpointing": False}
        return pl.Trainer(max_epochs=epochs, callbacks=[*callbacks], **more)

    module = Classifier(resnet18(num_classes=classes), lr=0.05)
    sparsity = slimming.Sparsity(module.network, images[:1], s=args.s)
    trainer(args.epochs, Sparsify(sparsity)).fit(module, training)
    dense = module.network.eval()
    pruned = slimming.prune(dense, images[:8], flops=args.flops, measure="bn")
    repaired = slimming.repair(pruned, dense, images)
    slimming.save(repaired, args.save)
    tuned = slimming.load(args.save, lambda: resnet18(num_classes=classes))
    trainer(args.tune).fit(Classifier(tuned, lr=0.005), training)
    slimming.save(tuned, args.save)

    stages = {"dense": dense, "pruned": pruned.model, "repaired": repaired.model}
    stages["fine-tuned"] = tuned
    judge = trainer(1)
    scores = {
        name: judge.validate(Classifier(model, 0.0), test, verbose=False)[0]["top1"]
        for name, model in stages.items()
    }
    print(slimming.compare(stages, images[:32], top1=scores))
    print(f"saved {args.save}")


def data(folder: Path | None) -> tuple[list[Dataset], int]:
    """Pictures to train on, one in five to test, and the number of classes."""
    if folder is None:
        digits = load_digits()
        images = interpolate(torch.from_numpy(digits.images).float()[:, None] / 16, 32)
        whole: Dataset = TensorDataset(images.repeat(1, 3, 1, 1), torch.from_numpy(digits.target))
        return random_split(whole, [0.8, 0.2]), 10
    ready = [transforms.Resize((64, 64)), transforms.ToTensor()]
    pictures = ImageFolder(folder, transforms.Compose(ready))
    return random_split(pictures, [0.8, 0.2]), len(pictures.classes)


if __name__ == "__main__":
    main()
