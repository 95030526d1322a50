"""Batches on the training device: shuffle, crop, flip and normalise whole batches of uint8."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from slimming import datasets
from slimming.errors import UserError

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
PAD = 4


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) images as floats of mean 0 and deviation 1: (x / 255 - mean) / std."""
    mean, std = _mean_and_std(images.device)
    return images.float().div_(255).sub_(mean).div_(std)


@functools.cache  # a copy to a GPU in each batch would wait for it
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))


def crop(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Pad (N, 3, H, W) with PAD black pixels and cut H x W out at ``shift`` (N, 2), 0 to 2 PAD."""
    height, width = images.shape[2:]
    padded = F.pad(images, (PAD,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, 3, 9, 9, H, W)
    rows = torch.arange(len(images), device=images.device)
    return windows[rows, :, shift[:, 0], shift[:, 1]]


def flip(images: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Mirror the (N, 3, H, W) images where ``mirrored`` (N,) is true."""
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


@dataclass
class Batches:
    """Iterate over (normalised images (B, 3, 32, 32), labels (B,)) on ``split``'s device.

    With ``augment`` the order, crops and flips of an epoch are functions of ``seed`` and ``epoch``
    alone; set ``epoch`` before iterating. Without, the images come in order, as they are. The last
    batch may be smaller.
    """

    split: datasets.Split
    batch_size: int
    augment: bool = False
    mirror: bool = True
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    @property
    def num_images(self) -> int:
        return len(self.split.images)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, labels, _ = self.split
        if not self.augment:
            for batch in zip(
                images.split(self.batch_size), labels.split(self.batch_size), strict=True
            ):
                yield normalize(batch[0]), batch[1]
            return
        draws = (draw.to(images.device).split(self.batch_size) for draw in self._draws())
        for order, shift, mirrored in zip(*draws, strict=True):
            batch = flip(crop(images[order], shift), mirrored)
            yield normalize(batch), labels[order]

    def _draws(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The whole epoch's order (N,), crops (N, 2) and flips (N,), drawn on the CPU."""
        words = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> 1))
        n = self.num_images
        order = torch.randperm(n, generator=generator)
        shift = torch.randint(2 * PAD + 1, (n, 2), generator=generator)
        mirrored = torch.randint(2, (n,), generator=generator).bool()
        return order, shift, mirrored & self.mirror


def folder_of(name: str, given: str | None) -> Path:
    """Where a dataset lives: ``--data``, or ./data.<dataset>."""
    return Path(given or f"./data.{name}")


def batches(
    name: str,
    given: str | None,
    split: str,
    batch_size: int,
    device: torch.device,
    workers: int = 1,
    seed: int = 0,
) -> Batches:
    """The 'train' batches (shuffled, augmented) or the 'test' batches of a dataset, on ``device``.

    ``given``: what ``--data`` says, or None. UserError if the data cannot be had.
    """
    images, labels, classes = datasets.load(name, folder_of(name, given), split, workers)
    if len(images) == 0:
        raise UserError(f"the {split} part of {name} holds no images")
    on_device = datasets.Split(images.to(device), labels.to(device), classes)
    return Batches(
        on_device, batch_size, augment=split == "train", mirror=name in datasets.FLIPPED, seed=seed
    )


def check_classes(loader: Batches, expected: int | None, path: str | None) -> None:
    """UserError if the network in ``path`` tells another number of classes apart than the data."""
    found = len(loader.split.classes)
    if expected not in (None, found):
        raise UserError(
            f"{path} tells {expected} classes apart, but the data has {found}: give the --dataset "
            "and --data that it was trained on"
        )
