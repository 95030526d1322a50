"""Which images of an epoch a process takes, and what their mean weighs."""

from collections.abc import Iterator
from typing import Protocol


class Loader(Protocol):
    """What a loader of batches says of an epoch: the images, how many of them a step takes, and
    which of the processes this one is."""

    batch_size: int
    rank: int
    ranks: int

    @property
    def num_images(self) -> int: ...


class Augmenting(Loader, Protocol):
    """A loader that knows whether it is for training."""

    augment: bool


def shares(loader: Augmenting) -> Iterator[slice]:
    """Which places of the epoch's order this process takes, batch by batch.

    A training batch that is too small for every process to get an image is left out.
    """
    for start in range(0, loader.num_images, loader.batch_size):
        stop = min(start + loader.batch_size, loader.num_images)
        if stop - start < loader.ranks and loader.augment:
            return
        if start + loader.rank < stop:
            yield slice(start + loader.rank, stop, loader.ranks)


def weight(loader: Loader, step: int, count: int) -> float:
    """What the mean over ``count`` images of batch ``step`` (from 0) in this process weighs in the
    mean over all processes: 1 where all have as many."""
    if loader.ranks == 1:
        return 1
    whole = min(loader.batch_size, loader.num_images - step * loader.batch_size)
    return count * loader.ranks / whole
