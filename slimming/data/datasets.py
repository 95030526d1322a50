"""Datasets by name, small images decoded once, and the settings that choose one."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from slimming.data.batches import BORDER, OFFLINE, Split, to_32x32
from slimming.data.image_folder import read_folder
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.runtime import optional
from slimming.runtime.device import MAX_THREADS
from slimming.settings import count, number, setting
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


def dataset_field(default: str = "", names: tuple[str, ...] = NAMES) -> Any:
    """The field of the dataset: one of ``names``; ``default`` describes the default without a
    checkpoint."""
    text = f"{', '.join(names)} (default: from the checkpoint{default})"
    return setting(None, text, metavar="NAME", choices=names)


@dataclass(frozen=True)
class DataSettings:
    """A dataset, how it is loaded, and the device.

    ``dataset`` and ``image_size`` (pixels) are None if the checkpoint gives them.
    """

    title: ClassVar[str] = "data and device"
    dataset: str | None = dataset_field()
    data: str | None = setting(
        None, "folder of the dataset (default: ./data.<dataset>)", metavar="DIR"
    )
    image_size: int | None = setting(
        None,
        "height and width of images in pixels; other sizes than 32 are streamed and need "
        "--dataset folder (default: 32)",
        metavar="N",
        parse=count,
    )
    test_batch_size: int = setting(256, "batch size of the evaluation", metavar="N", parse=count)
    workers: int = setting(
        os.cpu_count() or 1,
        "number of threads or processes that decode image files (default: number of CPU cores)",
        metavar="N",
        parse=count,
    )
    threads: int | None = setting(
        None,
        "number of CPU threads for computation (default: PyTorch's default)",
        metavar="N",
        parse=number(int, 1, MAX_THREADS),
    )
    device: str | None = setting(
        None, "cpu, cuda, cuda:1, ... (default: cuda if available)", metavar="NAME"
    )
    no_cuda: bool = setting(False, "use the CPU even if CUDA is available", kind="switch")

    def folder(self, dataset: str) -> Path:
        """The folder of ``dataset``, to which it is downloaded."""
        return Path(self.data or f"./data.{dataset}")
