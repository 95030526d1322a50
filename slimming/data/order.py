"""Which images: of an epoch for each process, of a class for a sample."""

from collections.abc import Iterator
from typing import Protocol

import torch


class Loader(Protocol):
    """A loader of batches: the images of an epoch, how many of them a step takes, and the rank of
    this process."""

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
    """The indices of ``count`` images, or of all if there are fewer, drawn by ``seed``: one of each
    class in turns, as long as it has any left."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels.cpu()[order]
    turn = torch.empty_like(order)
    for label in shuffled.unique():
        own = shuffled == label
        turn[own] = torch.arange(int(own.sum()))
    return order[turn.argsort(stable=True)[:count]]
