"""Load a dataset by name, as batches on the device."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from slimming.data import datasets, image_folder
from slimming.data.batches import SIZE, Batches, DeviceLoader, Split
from slimming.data.datasets import DataSettings
from slimming.data.image_folder import Stream
from slimming.errors import UserError
from slimming.runtime import distributed
from slimming.storage.checkpoint import Contents
from slimming.storage.preprocessing import CIFAR, Preprocessing

Data = Batches | Stream  # a dataset, as batches on the device
SAMPLING = 2**31  # offset of the epoch, so that samples differ from the batches of training


class Description(Protocol):
    """What `batches_for` reads of the description of a network, an
    `architecture.Architecture`: importing that would import all networks."""

    @property
    def dataset(self) -> str: ...

    @property
    def image_size(self) -> int: ...

    @property
    def preprocessing(self) -> Preprocessing: ...


def batches(
    name: str,
    part: str,
    batch_size: int,
    device: torch.device,
    image_size: int,
    settings: DataSettings,
    seed: int = 0,
    preprocessing: Preprocessing = CIFAR,
) -> Data:
    """The 'train' batches (shuffled, augmented) or the 'test' batches of a dataset, on ``device``,
    for a network with this ``image_size`` and ``preprocessing``.

    Small images are kept in memory (`Batches`); an image folder with an ``image_size`` other than
    32 is streamed from disk (`slimming.data.image_folder.Stream`). Order and augmentation of an
    epoch depend on ``seed``. UserError if the data is unavailable.
    """
    folder = settings.folder(name)
    augment = part == "train"
    shape: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "rank": distributed.rank(),
        "ranks": distributed.world_size(),
        "preprocessing": preprocessing,
    }
    if image_size != SIZE:
        if name != "folder":
            raise UserError(
                f"`image_size` {image_size} needs `dataset` folder: images of {name} are {SIZE}x"
                f"{SIZE}"
            )
        _, samples, classes = image_folder.scan_folder(folder, part)
        return Stream(
            samples, classes, image_size, device, settings.workers, augment=augment, **shape
        )
    with distributed.first_process_first():
        images, labels, classes = datasets.load(name, folder, part, settings.workers)
    on_device = Split(images.to(device), labels.to(device), classes)
    return Batches(on_device, augment=augment, mirror=datasets.KINDS[name].mirror, **shape)


def batches_for(
    network: Description,
    part: str,
    batch_size: int,
    device: torch.device,
    settings: DataSettings,
    seed: int = 0,
) -> Data:
    """The `batches` of the dataset of ``network``, with its image size and preprocessing."""
    size, preprocessing = network.image_size, network.preprocessing
    return batches(network.dataset, part, batch_size, device, size, settings, seed, preprocessing)


def on_device(loader: Iterable, device: torch.device) -> "Data | DeviceLoader":
    """``loader`` wrapped in a `DeviceLoader`, unless it is a `Batches` or `Stream`, whose batches
    are already on the device."""
    return loader if isinstance(loader, Data) else DeviceLoader(loader, device)


def samples(
    loader: Data, count: int, number: int, balanced: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of ``count`` random training images of ``loader``, augmented as in training. They
    depend only on its seed and ``number``.

    With ``balanced``, ``count`` // classes images of each class, fewer if a class has fewer. If the
    images are in memory, every process gets the same ones.
    """
    view = copy.copy(loader)
    view.epoch, view.rank, view.ranks = number + SAMPLING, 0, 1
    if hasattr(loader, "loader"):  # the workers of a stream read the epoch of the stream itself
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
    loader: Data,
    outputs: int,
    contents: Contents,
    path: str | Path,
    asked: int | None = None,
) -> None:
    """UserError if the network in ``path`` was trained with other classes than those of the data:
    it has another number of ``outputs``, or the ``contents`` of the file record other names.

    More outputs than classes are allowed if the network was trained that way, or if ``asked``, the
    requested number of outputs, is given.
    """
    names, num_classes = contents.get("classes", ()), len(loader.classes)
    recorded = isinstance(names, list) and len(names) == num_classes
    if recorded:
        for ours, theirs in zip(names, loader.classes, strict=True):
            if ours != theirs:
                raise UserError(
                    f"{path} was trained with class {ours!r} where the data has {theirs!r}: use "
                    "the `dataset` and `data` that it was trained on"
                )
    if outputs < num_classes or (outputs > num_classes and not recorded and not asked):
        raise UserError(
            f"{path} has {outputs} classes, but the data has {num_classes}: use the `dataset` and "
            "`data` that it was trained on"
        )
