"""What the batches of all loaders share: random numbers of an epoch, each process's part, mean and
deviation of the pixels."""

import functools
from collections.abc import Iterator

import numpy as np
import torch

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) images as floats of mean 0 and deviation 1: (x / 255 - mean) / std."""
    mean, std = _mean_and_std(images.device)
    return images.float().div_(255).sub_(mean).div_(std)


@functools.cache  # a copy to a GPU in each batch would wait for it
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))


def epoch_generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU that is a function of the ``numbers`` (seed, epoch, ...)."""
    words = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))


def shares(loader) -> Iterator[slice]:
    """Which places of the epoch's order this process takes, batch by batch.

    A training batch that is too small for every process to get an image is left out.
    """
    for start in range(0, loader.num_images, loader.batch_size):
        stop = min(start + loader.batch_size, loader.num_images)
        if stop - start < loader.ranks and loader.augment:
            return
        if start + loader.rank < stop:
            yield slice(start + loader.rank, stop, loader.ranks)


def weight(loader, step: int, count: int) -> float:
    """What the mean over ``count`` images of batch ``step`` (from 0) in this process weighs in the
    mean over all processes: 1 where all have as many."""
    if loader.ranks == 1:
        return 1
    whole = min(loader.batch_size, loader.num_images - step * loader.batch_size)
    return count * loader.ranks / whole
