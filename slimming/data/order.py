"""The order of images: the share of each process, and samples with equally many of each class."""

from collections.abc import Iterator
from typing import Protocol

import torch


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
