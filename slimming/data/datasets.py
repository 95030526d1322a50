"""Small-image datasets by name, decoded once into memory."""

from pathlib import Path

import torch

from slimming.data.image_folder import _image_folder
from slimming.data.pixels import OFFLINE, Split, to_32x32
from slimming.errors import UserError
from slimming.runtime import optional
from slimming.storage import files

NAMES = ("cifar10", "cifar100", "svhn", "mnist", "fashionmnist", "folder", "digits")


# A mirrored digit is no longer the same digit; a mirrored object still is the same object.
FLIPPED = ("cifar10", "cifar100", "fashionmnist", "folder")


# the folders into which torchvision extracts its downloads
ON_DISK = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def load(name: str, folder: Path, split: str, workers: int = 1) -> Split:
    """The ``split`` ('train' or 'test') of the dataset ``name`` (see NAMES) in ``folder``.

    ``workers`` threads decode image files. UserError if the data is unavailable.
    """
    if name == "folder":
        return _image_folder(folder, split, workers)
    if name == "digits":
        return _digits(split)
    if name not in NAMES:
        raise UserError(f"unknown dataset {name!r}: use {', '.join(NAMES)}")
    return _torchvision(name, folder, split)


def _torchvision(name: str, folder: Path, split: str) -> Split:
    from torchvision import datasets

    if name == "svhn":  # torchvision would fail only after the download
        optional.need("scipy.io", "scipy", "--dataset svhn")
    kinds = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "svhn": datasets.SVHN,
        "mnist": datasets.MNIST,
        "fashionmnist": datasets.FashionMNIST,
    }
    which = {"split": split} if name == "svhn" else {"train": split == "train"}
    inner = folder / kinds[name].__name__  # used by MNIST
    try:
        with files.no_empty_folders(inner / "raw", inner, folder, *folder.parents):
            data = kinds[name](root=str(folder), download=True, **which)
    except Exception as error:  # torchvision raises many types: network, disk, broken files
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load or download {name} into {folder} ({reason}): put the files "
            f"there, or set --data to their folder; {OFFLINE}"
        ) from error
    images = torch.as_tensor(data.data)
    if name.startswith("cifar"):
        images = images.permute(0, 3, 1, 2)  # stored (N, H, W, C)
    labels = torch.as_tensor(data.labels if name == "svhn" else data.targets)
    classes = getattr(data, "classes", [str(digit) for digit in range(10)])
    return Split(to_32x32(images), labels.long(), list(classes))


def _digits(split: str) -> Split:
    """scikit-learn's 1,797 digits, 8x8 with 17 grey levels: 1,437 to train, 360 to test."""
    optional.need("sklearn.datasets", "scikit-learn", "--dataset digits")
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
