"""Batches on the training device: shuffle, crop, flip and normalise whole batches of uint8."""

import contextlib
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

from slimming.data.order import balanced, rank_slices
from slimming.data.pixels import Split, normalize
from slimming.runtime.randomness import epoch_generator
from slimming.storage.preprocessing import CIFAR, Preprocessing

PAD = 4


def crop(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Pad (N, 3, H, W) with PAD black pixels and crop H x W at ``shift`` (N, 2), 0 to 2 PAD."""
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
    """Iterate over (images (B, 3, 32, 32), labels (B,)) on ``split``'s device, normalised for the
    network with this ``preprocessing``.

    With ``augment`` the order, crops and flips of an epoch depend only on ``seed`` and ``epoch``;
    set ``epoch`` before iterating. Without it, the images are in order and unchanged. The last
    batch may be smaller. With several processes, process ``rank`` of ``ranks`` gets its part of
    every batch; ``batch_size`` is the size of the whole batch.
    """

    split: Split
    batch_size: int
    augment: bool = False
    mirror: bool = True
    seed: int = 0
    epoch: int = 0
    rank: int = 0
    ranks: int = 1
    preprocessing: Preprocessing = CIFAR

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    @property
    def num_images(self) -> int:
        return len(self.split.images)

    @property
    def classes(self) -> list[str]:
        return self.split.classes

    @property
    def device(self) -> torch.device:
        return self.split.images.device

    def first(self, count: int) -> torch.Tensor:
        """The first images, normalised."""
        return normalize(self.split.images[:count], self.preprocessing)

    def draw(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` random images, equally many of each class, not augmented, and their labels."""
        chosen = balanced(self.split.labels, count, seed).to(self.device)
        images = normalize(self.split.images[chosen], self.preprocessing)
        return images, self.split.labels[chosen]

    def keeping_workers(self) -> contextlib.AbstractContextManager[None]:
        """See `slimming.data.stream.Stream`; images in memory need no workers."""
        return contextlib.nullcontext()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, labels, _ = self.split
        if self.augment:
            order, shift, mirrored = (draw.to(images.device) for draw in self._draws())
        for own in rank_slices(self):
            if self.augment:
                batch = flip(crop(images[order[own]], shift[own]), mirrored[own])
                yield normalize(batch, self.preprocessing), labels[order[own]]
            else:
                yield normalize(images[own], self.preprocessing), labels[own]

    def _draws(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Order (N,), crops (N, 2) and flips (N,) of the whole epoch, sampled on the CPU: the same
        in every process."""
        generator, n = epoch_generator(self.seed, self.epoch), self.num_images
        order = torch.randperm(n, generator=generator)
        shift = torch.randint(2 * PAD + 1, (n, 2), generator=generator)
        mirrored = torch.randint(2, (n,), generator=generator).bool()
        return order, shift, mirrored & self.mirror


class DeviceLoader:
    """Move the batches of any iterable of (images, labels), such as a DataLoader, to ``device``.

    ``num_images`` is the number of images of an epoch, 0 if it is unknown.
    """

    rank, ranks = 0, 1

    def __init__(self, loader: Iterable, device: torch.device):
        self.loader, self.device, self.epoch, self.num_images = loader, device, 0, 0
        if (
            isinstance(loader, DataLoader)
            and not isinstance(loader.dataset, IterableDataset)
            and isinstance(loader.sampler, Sized)
        ):
            whole = loader.batch_size if loader.drop_last else None
            self.num_images = len(loader) * whole if whole else len(loader.sampler)
            self.batch_size = loader.batch_size or -(-self.num_images // max(1, len(loader)))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if set_epoch:  # a DistributedSampler needs it to shuffle
            set_epoch(self.epoch)
        for images, labels in self.loader:
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
