"""The training loop of the original scripts in plain form, and the changes from it to ours."""

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms

from models import NETWORKS
from slimming.data.batches import MEAN, STD
from slimming.training.penalties import L1Penalty
from slimming.training.trainer import make_optimizer

BATCH, S = 64, 1e-4
# the loop with one more change at a time; the last one is the suite except for its memory
CHANGES = ("identity selection", "channels_last", "fused step", "images in memory")


class Pictures(torch.utils.data.Dataset):
    """Images (N, H, W, 3) that become PIL images one by one, as torchvision's CIFAR does."""

    def __init__(
        self,
        pixels: np.ndarray,
        labels: torch.Tensor,
        transform: Callable[[Image.Image], torch.Tensor],
    ):
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[i])), int(self.labels[i])


def changes_of(variant: str) -> tuple[str, ...]:
    """The changes of a variant relative to the reference: this one and those before it."""
    return CHANGES[: CHANGES.index(variant) + 1] if variant in CHANGES else ()


def reference_epoch(
    arch: str,
    depth: int,
    images: torch.Tensor,
    labels: torch.Tensor,
    device: torch.device,
    changes: tuple[str, ...] = (),
    batch_size: int = BATCH,
) -> Callable[[], None]:
    """The classic loop, with some of `CHANGES`."""
    transform = transforms.Compose(
        [
            transforms.Pad(4),
            transforms.RandomCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    pixels = images.permute(0, 2, 3, 1).numpy()

    pictures = Pictures(pixels, labels, transform)
    loader = torch.utils.data.DataLoader(
        pictures,
        batch_size,
        shuffle=True,
        num_workers=1,
        persistent_workers=True,  # exclude the start of the worker, as an epoch is usually long
    )
    selection = {} if "identity selection" in changes else classic_selection(arch)
    model = NETWORKS[arch](depth=depth, **selection).to(device)
    layout = torch.contiguous_format
    if "channels_last" in changes:
        layout = torch.channels_last
        model = model.to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    penalty = functools.partial(update_bn_by_loop, model)
    if "fused step" in changes:
        optimizer, penalty = make_optimizer(model, 0.01, 0.9, 1e-4), L1Penalty(model, S)

    def run() -> None:
        model.train()
        for batch, target in loader:
            batch, target = batch.to(device, memory_format=layout), target.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch), target)
            loss.backward()
            penalty()
            optimizer.step()
            loss.item()

    return run


def update_bn_by_loop(model: nn.Module, s: float = S) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.grad.data.add_(s * torch.sign(module.weight.data))


class ClassicSelection(nn.Module):
    """Channel selection that computes its indices on the host in every forward."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.indexes = nn.Parameter(torch.ones(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = np.squeeze(np.argwhere(self.indexes.detach().cpu().numpy()))
        return x[:, torch.as_tensor(kept, device=x.device)]


def classic_selection(arch: str) -> dict:
    return {} if arch == "vgg" else {"selection": ClassicSelection}
