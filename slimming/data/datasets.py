"""Small-image datasets by name, decoded once into memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from slimming.data.image_folder import read_folder
from slimming.data.pixels import BORDER, OFFLINE, Split, to_32x32
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.runtime import optional
from slimming.storage import files


@dataclass(frozen=True)
class Kind:
    """A dataset. ``read`` gives the split ('train' or 'test') kept in a folder, with some threads;
    ``mirror``: a mirror image shows the same class (a mirrored digit does not); ``archive``: the
    folder into which torchvision extracts the download; ``border``: the number of black pixels that
    `to_32x32` puts around each image."""

    read: Callable[[Path, str, int], Split]
    mirror: bool = False
    archive: str | None = None
    border: int = 0


def load(name: str, folder: Path, split: str, workers: int = 1) -> Split:
    """The ``split`` ('train' or 'test') of the dataset ``name`` (see KINDS) in ``folder``.

    ``workers`` threads decode image files. UserError if the data is unavailable.
    """
    if name not in KINDS:
        raise UserError(f"unknown dataset {name!r}: use {', '.join(KINDS)}")
    return KINDS[name].read(folder, split, workers)


def _torchvision(name: str, folder: Path, split: str, workers: int = 1) -> Split:
    """The dataset that torchvision's class ``name`` downloads and reads."""
    from torchvision import datasets

    if name == "SVHN":  # torchvision would fail only after the download
        optional.need("scipy.io", "scipy", "`dataset` svhn")
    which = {"split": split} if name == "SVHN" else {"train": split == "train"}
    inner = folder / name  # used by MNIST
    try:
        with files.no_empty_folders(inner / "raw", inner, folder, *folder.parents):
            data = getattr(datasets, name)(root=str(folder), download=True, **which)
    except Exception as error:  # torchvision raises many types: network, disk, broken files
        raise_if_of_the_machine(error)
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load or download {name.lower()} into {folder} ({reason}): put the files "
            f"there, or set `data` to their folder; {OFFLINE}"
        ) from error
    images = torch.as_tensor(data.data)
    if images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)  # stored (N, H, W, C)
    labels = torch.as_tensor(data.labels if name == "SVHN" else data.targets)
    classes = getattr(data, "classes", [str(digit) for digit in range(10)])
    return Split(to_32x32(images), labels.long(), list(classes))


def _digits(folder: Path, split: str, workers: int = 1) -> Split:
    """scikit-learn's 1,797 digits, 8x8 with 17 grey levels: 1,437 to train, 360 to test."""
    optional.need("sklearn.datasets", "scikit-learn", "`dataset` digits")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    images, labels = (train, train_labels) if split == "train" else (test, test_labels)
    grey = torch.as_tensor(images * (255 / 16)).round().byte()
    names = [str(name) for name in digits.target_names]
    return Split(to_32x32(grey), torch.as_tensor(labels).long(), names)


KINDS = {
    "cifar10": Kind(partial(_torchvision, "CIFAR10"), True, "cifar-10-batches-py"),
    "cifar100": Kind(partial(_torchvision, "CIFAR100"), True, "cifar-100-python"),
    "svhn": Kind(partial(_torchvision, "SVHN")),
    "mnist": Kind(partial(_torchvision, "MNIST"), border=BORDER),
    "fashionmnist": Kind(partial(_torchvision, "FashionMNIST"), mirror=True, border=BORDER),
    "folder": Kind(read_folder, mirror=True),
    "digits": Kind(_digits),
}
NAMES = tuple(KINDS)
ON_DISK = {name: kind.archive for name, kind in KINDS.items() if kind.archive}
