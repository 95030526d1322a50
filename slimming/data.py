"""Batches on the training device: shuffle, crop, flip and normalise whole batches of uint8."""

import argparse
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

from slimming import datasets, distributed
from slimming.epochs import MEAN, STD, epoch_generator, normalize, shares, weight
from slimming.errors import UserError
from slimming.streaming import Stream

__all__ = [
    "MEAN",
    "STD",
    "Batches",
    "batches",
    "check_classes",
    "normalize",
    "on_device",
    "samples",
    "weight",
]

PAD = 4
SAMPLING = 2**31  # added to the number of an epoch: other draws than those of training


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
    batch may be smaller. Of several processes each gets its part of every batch: number ``rank`` of
    ``ranks``, whose ``batch_size`` is that of all together.
    """

    split: datasets.Split
    batch_size: int
    augment: bool = False
    mirror: bool = True
    seed: int = 0
    epoch: int = 0
    rank: int = 0
    ranks: int = 1

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
        return normalize(self.split.images[:count])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, labels, _ = self.split
        if self.augment:
            order, shift, mirrored = (draw.to(images.device) for draw in self._draws())
        for own in shares(self):
            if self.augment:
                batch = flip(crop(images[order[own]], shift[own]), mirrored[own])
                yield normalize(batch), labels[order[own]]
            else:
                yield normalize(images[own]), labels[own]

    def _draws(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The whole epoch's order (N,), crops (N, 2) and flips (N,), drawn on the CPU: the same in
        every process."""
        generator, n = epoch_generator(self.seed, self.epoch), self.num_images
        order = torch.randperm(n, generator=generator)
        shift = torch.randint(2 * PAD + 1, (n, 2), generator=generator)
        mirrored = torch.randint(2, (n,), generator=generator).bool()
        return order, shift, mirrored & self.mirror


def batches(
    name: str,
    part: str,
    batch_size: int,
    device: torch.device,
    image_size: int,
    args: argparse.Namespace,
):
    """The 'train' batches (shuffled, augmented) or the 'test' batches of a dataset, on ``device``.

    Small images come from memory (`Batches`), an image folder at another ``image_size`` than 32
    from disk (`slimming.streaming.Stream`). ``args`` holds --data, --workers and, for training,
    --seed. UserError if the data cannot be had.
    """
    folder = Path(args.data or f"./data.{name}")
    settings = {
        "batch_size": batch_size,
        "augment": part == "train",
        "seed": getattr(args, "seed", 0),
        "rank": distributed.rank(),
        "ranks": distributed.world_size(),
    }
    if image_size != datasets.SIZE:
        if name != "folder":
            raise UserError(f"--image-size {image_size} is for --dataset folder: {name} is small")
        _, samples, classes = datasets.scan_folder(folder, part)
        return Stream(samples, classes, image_size, device, args.workers, **settings)
    with distributed.first_goes_first():
        images, labels, classes = datasets.load(name, folder, part, args.workers)
    on_device = datasets.Split(images.to(device), labels.to(device), classes)
    return Batches(on_device, mirror=name in datasets.FLIPPED, **settings)


class Moved:
    """The batches of any iterable of (images, labels), such as torch's DataLoader, on ``device``.

    ``num_images`` of an epoch is 0 where the loader does not tell.
    """

    rank, ranks = 0, 1

    def __init__(self, loader: Iterable, device: torch.device):
        self.loader, self.device, self.epoch, self.num_images = loader, device, 0, 0
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            whole = loader.batch_size if loader.drop_last else None
            self.num_images = len(loader) * whole if whole else len(loader.sampler)
            self.batch_size = loader.batch_size or -(-self.num_images // len(loader))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if set_epoch:  # a DistributedSampler shuffles by it
            set_epoch(self.epoch)
        for images, labels in self.loader:
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )


def on_device(loader: Iterable, device: torch.device):
    """``loader`` itself if it is one of this suite, whose batches are on their device; another as
    `Moved`."""
    return loader if isinstance(loader, Batches | Stream) else Moved(loader, device)


def samples(
    loader, count: int, number: int, balanced: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of ``count`` shuffled images of a training ``loader``, chosen by its seed and
    ``number``; ``balanced`` takes equally many of each class.

    The same in every process where the images live in memory.
    """
    view = copy.copy(loader)
    view.epoch, view.rank, view.ranks = number + SAMPLING, 0, 1
    if hasattr(loader, "loader"):  # a stream's workers read the settings of the stream itself
        loader.epoch = view.epoch
    limit = max(1, count // len(loader.classes)) if balanced else count
    taken, chosen, missing = [0] * len(loader.classes), [], count
    for images, labels in view:
        keep = []
        for i, label in enumerate(labels.tolist()):
            if len(keep) < missing and (not balanced or taken[label] < limit):
                taken[label] += 1
                keep.append(i)
        missing -= len(keep)
        if keep:
            chosen.append((images[keep], labels[keep]))
        if missing <= 0 or (balanced and min(taken) >= limit):
            break
    return chosen


def check_classes(
    loader, outputs: int, contents: dict, path: str, asked: int | None = None
) -> None:
    """UserError if the network in ``path`` tells other classes apart than the data has: another
    number, or other names than the ``contents`` of the file record.

    It may have more ``outputs`` than the data has classes if it was trained so, or if that is what
    --num_classes ``asked`` for.
    """
    names, found = contents.get("classes"), len(loader.classes)
    recorded = isinstance(names, list) and len(names) == found
    if recorded:
        for ours, theirs in zip(names, loader.classes, strict=True):
            if ours != theirs:
                raise UserError(
                    f"{path} was trained on class {ours!r} where the data has {theirs!r}: give the "
                    "--dataset and --data that it was trained on"
                )
    if outputs < found or (outputs > found and not recorded and not asked):
        raise UserError(
            f"{path} tells {outputs} classes apart, but the data has {found}: give the --dataset "
            "and --data that it was trained on"
        )
