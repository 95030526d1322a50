"""Split the batches of an epoch between processes."""

from collections.abc import Iterator
from typing import Any


def rank_slices(loader: Any) -> Iterator[slice]:
    """For each batch, the slice of the epoch's order that this process gets.

    A training batch with fewer images than processes is dropped.
    """
    for start in range(0, loader.num_images, loader.batch_size):
        stop = min(start + loader.batch_size, loader.num_images)
        if stop - start < loader.ranks and loader.augment:
            return
        if start + loader.rank < stop:
            yield slice(start + loader.rank, stop, loader.ranks)


def loss_weight(loader: Any, step: int, count: int) -> float:
    """The weight of this process's loss, the mean over ``count`` images of batch ``step`` (from 0),
    in the mean over all processes: 1 if all have equally many images."""
    if loader.ranks == 1:
        return 1
    whole = min(loader.batch_size, loader.num_images - step * loader.batch_size)
    return count * loader.ranks / whole
