"""Batches from memory on the device: order, augmentation and normalisation of whole batches."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

from slimming.runtime.device import epoch_generator
from slimming.storage.preprocessing import CIFAR, Preprocessing

SIZE = 32
BORDER = 2  # black pixels around 28x28 images

OFFLINE = "`dataset` digits needs no download"


class Split(NamedTuple):
    """Images (N, 3, 32, 32) uint8, their labels (N,) int64, and the names of the classes."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]


MEAN, STD = CIFAR.mean, CIFAR.std


def normalize(images: torch.Tensor, preprocessing: Preprocessing = CIFAR) -> torch.Tensor:
    """Normalise uint8 (N, 3, H, W) images for the network with this ``preprocessing``:
    (x / 255 - mean) / std, as floats."""
    mean, std = _mean_and_std(preprocessing, images.device)
    return images.float().div_(255).sub_(mean).div_(std)


def denormalize(images: torch.Tensor, preprocessing: Preprocessing = CIFAR) -> torch.Tensor:
    """The uint8 images that `normalize` turns into these (N, 3, H, W)."""
    mean, std = _mean_and_std(preprocessing, images.device)
    return (images.float() * std).add_(mean).mul_(255).round_().clamp_(0, 255).byte()


@functools.cache  # a copy in each batch would synchronise with the GPU
def _mean_and_std(
    preprocessing: Preprocessing, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    both = preprocessing.mean, preprocessing.std
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in both)
    return mean, std


def to_32x32(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, 3, 32, 32) from grey images (N, H, W) or from (N, 3, H, W).

    28x28 images are padded with `BORDER` black pixels, others are resized (bilinear).
    """
    if images.dim() == 3:
        images = images[:, None].expand(-1, 3, -1, -1)
    if images.shape[2:] == (28, 28):
        return F.pad(images, 4 * (BORDER,))
    if images.shape[2:] == (SIZE, SIZE):
        return images.contiguous()
    resized = F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", align_corners=False)
    return resized.round().clamp(0, 255).byte()


class Loader(Protocol):
    """A loader of batches: the number of images of an epoch, the size of a batch over all
    processes, and the rank of this process among ``ranks``."""

    batch_size: int
    rank: int
    ranks: int

    @property
    def num_images(self) -> int: ...


class Augmenting(Loader, Protocol):
    """A loader that knows whether it is for training."""

    augment: bool


def rank_slices(loader: Augmenting) -> Iterator[slice]:
    """For each batch, the slice of the epoch's order that this process gets.

    A training batch with fewer images than processes is dropped.
    """
    for start in range(0, loader.num_images, loader.batch_size):
        stop = min(start + loader.batch_size, loader.num_images)
        if stop - start < loader.ranks and loader.augment:
            return
        if start + loader.rank < stop:
            yield slice(start + loader.rank, stop, loader.ranks)


def loss_weight(loader: Loader, step: int, count: int) -> float:
    """The weight of this process's loss, the mean over ``count`` images of batch ``step`` (from 0),
    in the mean over all processes: 1 if all have equally many images."""
    if loader.ranks == 1:
        return 1
    whole = min(loader.batch_size, loader.num_images - step * loader.batch_size)
    return count * loader.ranks / whole


def balanced(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The indices (count,) of ``count`` random images, equally many of each class: classes that run
    out of images are made up for by the others. All images if there are fewer than ``count``."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels.cpu()[order]
    turn = torch.empty_like(order)
    for label in shuffled.unique():
        own = shuffled == label
        turn[own] = torch.arange(int(own.sum()))
    return order[turn.argsort(stable=True)[:count]]


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
        """See `slimming.data.image_folder.Stream`; images in memory need no workers."""
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
