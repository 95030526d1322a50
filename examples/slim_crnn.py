"""Slim a reader of text lines, a CNN below an LSTM with the CTC loss: the convolutions lose
channels, and the LSTM its inputs for them.

    python examples/slim_crnn.py --lines 3000 --epochs 10

The lines are made of scikit-learn's handwritten digits. Loaders of real lines fit in `make_lines`.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import ctc_loss, interpolate

import slimming

DIGITS = 4  # in a line


class CRNN(nn.Module):
    """Images (N, 1, 16, W) to log probabilities (N, W / 4, 11) of a blank and the digits."""

    def __init__(self, width: int = 32):
        super().__init__()

        def block(reads: int, writes: int, pool: tuple[int, int]) -> nn.Sequential:
            conv = nn.Conv2d(reads, writes, 3, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(writes), nn.ReLU(), nn.MaxPool2d(pool))

        pools = [(2, 2), (2, 2), (4, 1)]
        widths = [1, width, 2 * width, 4 * width]
        self.features = nn.Sequential(*map(block, widths, widths[1:], pools))
        self.lstm = nn.LSTM(4 * width, 64, bidirectional=True, batch_first=True)
        self.classifier = nn.Linear(128, 11)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        columns = self.features(images).flatten(1, 2).transpose(1, 2)
        return self.classifier(self.lstm(columns)[0]).log_softmax(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=3000, help="to make; one in five tests")
    parser.add_argument("--epochs", type=int, default=10, help="with the penalty")
    parser.add_argument("--tune", type=int, default=3, help="epochs of fine-tuning")
    parser.add_argument("--s", type=float, default=1e-3, help="strength of the penalty")
    parser.add_argument("--flops", type=float, default=0.5, help="fraction of FLOPs that stays")
    parser.add_argument("--save", default="slim-crnn.pth", help="file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, texts = make_lines(args.lines)
    count = len(images) * 4 // 5

    dense = CRNN()
    sparsity = slimming.Sparsity(dense, images[:1], s=args.s)
    train(dense, images[:count], texts[:count], args.epochs, 3e-3, sparsity)
    pruned = slimming.prune(dense, images[:8], flops=args.flops, measure="bn")
    repaired = slimming.repair(pruned, dense, images[:count][:1024])
    slimming.save(repaired, args.save)
    tuned = slimming.load(args.save, CRNN)
    train(tuned, images[:count], texts[:count], args.tune, 1e-3)
    slimming.save(tuned, args.save)

    stages = {"dense": dense, "pruned": pruned.model, "repaired": repaired.model}
    stages["fine-tuned"] = tuned
    scores = {name: read_right(m, images[count:], texts[count:]) for name, m in stages.items()}
    print(slimming.compare(stages, images[:32], lines=scores))
    print(f"saved {args.save}")


def train(
    model: nn.Module,
    images: torch.Tensor,
    texts: torch.Tensor,
    epochs: int,
    lr: float,
    sparsity: slimming.Sparsity | None = None,
) -> None:
    """Adam and the CTC loss, with the penalty of ``sparsity``."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    handles = sparsity.attach(optimizer) if sparsity else []
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images)).split(32):
            logs = model(images[rows]).transpose(0, 1)
            sizes = [torch.full((len(rows),), size) for size in (len(logs), DIGITS)]
            loss = ctc_loss(logs, texts[rows], *sizes, zero_infinity=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch}: loss {total / len(images):.4f}", flush=True)
    for handle in handles:
        handle.remove()
    model.eval()


@torch.no_grad()
def read_right(model: nn.Module, images: torch.Tensor, texts: torch.Tensor) -> float:
    """The fraction of lines in which every digit is right."""
    best = model.eval()(images).argmax(2)
    found = [row.unique_consecutive() for row in best]
    right = [row[row > 0].tolist() == text.tolist() for row, text in zip(found, texts, strict=True)]
    return sum(right) / len(right)


def make_lines(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lines (count, 1, 16, 64) of digits next to each other, and these plus 1 (count, DIGITS)."""
    digits = load_digits()
    picked = torch.randint(len(digits.images), (count, DIGITS))
    images = torch.from_numpy(digits.images).float()[picked] / 16
    lines = images.transpose(1, 2).reshape(count, 1, 8, 8 * DIGITS)
    return interpolate(lines, scale_factor=2), torch.from_numpy(digits.target)[picked] + 1


if __name__ == "__main__":
    main()
