"""The name of a dataset -> batches on the device."""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch

from slimming.data import datasets, image_folder
from slimming.data.batches import Batches, Moved
from slimming.data.pixels import SIZE, Split
from slimming.data.settings import DataSettings
from slimming.data.stream import Stream
from slimming.errors import UserError
from slimming.runtime import distributed

SAMPLING = 2**31  # added to the number of an epoch: other draws than those of training


def batches(
    name: str,
    part: str,
    batch_size: int,
    device: torch.device,
    image_size: int,
    settings: DataSettings,
    seed: int = 0,
) -> Batches | Stream:
    """The 'train' batches (shuffled, augmented) or the 'test' batches of a dataset, on ``device``.

    Small images come from memory (`Batches`), an image folder at another ``image_size`` than 32
    from disk (`slimming.data.stream.Stream`). Order and augmentation of an epoch follow from
    ``seed``. UserError if the data is unavailable.
    """
    folder = settings.folder(name)
    augment = part == "train"
    shape = {
        "batch_size": batch_size,
        "seed": seed,
        "rank": distributed.rank(),
        "ranks": distributed.world_size(),
    }
    if image_size != SIZE:
        if name != "folder":
            raise UserError(f"--image-size {image_size} is for --dataset folder: {name} is small")
        _, samples, classes = image_folder.scan_folder(folder, part)
        return Stream(
            samples, classes, image_size, device, settings.workers, augment=augment, **shape
        )
    with distributed.first_goes_first():
        images, labels, classes = datasets.load(name, folder, part, settings.workers)
    on_device = Split(images.to(device), labels.to(device), classes)
    return Batches(on_device, augment=augment, mirror=name in datasets.FLIPPED, **shape)


def on_device(loader: Iterable, device: torch.device) -> "Batches | Stream | Moved":
    """``loader`` itself if it is one of this suite, whose batches are on their device; another as
    `Moved`."""
    return loader if isinstance(loader, Batches | Stream) else Moved(loader, device)


def samples(
    loader: Batches | Stream, count: int, number: int, balanced: bool = False
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
        keep: list[int] = []
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
    loader: Batches | Stream,
    outputs: int,
    contents: dict,
    path: str | Path,
    asked: int | None = None,
) -> None:
    """UserError if the network in ``path`` tells other classes apart than the data has: another
    number, or other names than the ``contents`` of the file record.

    It may have more ``outputs`` than the data has classes if it was trained so, or if that is what
    --num_classes ``asked`` for.
    """
    names, found = contents.get("classes", ()), len(loader.classes)
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
