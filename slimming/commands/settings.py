"""Settings that commands share: the network, the checkpoint to start from, where results go."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from models import NETWORKS, constructor
from slimming.data.datasets import ON_DISK, DataSettings
from slimming.errors import UserError
from slimming.settings import count, plain_name, setting
from slimming.storage import files
from slimming.storage.architecture import Request

# in a folder, the first pattern that matches a file
PRUNED = ("pruned.pth.tar", "*_pruned.pth.tar")
TO_PRUNE = ("model_best.pth.tar", "*_best.pth.tar", *PRUNED)
PREACT = "preact_res"  # preact_res20 is the name of another suite for resnet with depth 20


def architecture_name(text: str) -> str:
    """The name of a network of this suite or of torchvision, or preact_res<depth>."""
    if not re.fullmatch(rf"{PREACT}\d{{1,4}}", text) and constructor(text) is None:
        raise ValueError(
            f"unknown network {text!r}: use {', '.join(NETWORKS)}, {PREACT}<depth>, or the name of "
            "a classification model of torchvision"
        )
    return text


def arch_field(default: str = "") -> Any:
    names = f"{', '.join(NETWORKS)}, {PREACT}<depth>, or the name of a classification model of "
    names += f"torchvision (default: from the checkpoint{default})"
    return setting(None, names, metavar="NAME", parse=architecture_name)


def depth_field(default: str = "") -> Any:
    text = f"depth of the network (default: from the checkpoint{default})"
    return setting(None, text, metavar="N", parse=count)


@dataclass(frozen=True)
class NetworkSettings:
    """The requested network; None if the checkpoint decides."""

    arch: str | None = arch_field()
    depth: int | None = depth_field()

    def __post_init__(self) -> None:
        if self.spelled_preact and self.depth not in (None, self._depth_of_name):
            raise UserError(
                f"--arch {self.arch} and --depth {self.depth} contradict each other: omit --depth"
            )

    @property
    def spelled_preact(self) -> bool:
        """Whether ``--arch`` is preact_res<depth>, which also means CIFAR-10 by default."""
        return self._depth_of_name is not None

    @property
    def _depth_of_name(self) -> int | None:
        name = self.arch or ""
        return int(name.removeprefix(PREACT)) if name.startswith(PREACT) else None

    @property
    def options(self) -> dict[str, Any] | None:
        """Further arguments of the constructor."""
        return None

    def request(self, data: DataSettings) -> Request:
        """What the flags ask of the network."""
        arch, depth = self.arch, self.depth
        if self.spelled_preact:
            arch, depth = "resnet", self._depth_of_name
        return Request(
            arch,
            depth,
            data.dataset,
            image_size=data.image_size,
            options=self.options,
            spelled=self.arch,
        )


def resume_field() -> Any:
    """The field of the checkpoint to resume from."""
    text = "resume from this checkpoint, with its settings; auto: the last one in --save, if any"
    return setting(None, text, metavar="FILE")


def save_field(default: str) -> Any:
    """The field of the results folder."""
    return setting(None, f"folder of the results (default: {default})", metavar="DIR")


def filename_field(default: str) -> Any:
    """The field of the file name that replaces ``default``."""
    text = f"file name to use instead of {default}"
    return setting(None, text, metavar="NAME", parse=plain_name)


def split_data_path(
    data_path: str | None, dataset: str | None, data: str | None
) -> tuple[str | None, str | None]:
    """``--data_path`` as (``--dataset``, ``--data``): it is CIFAR10 or CIFAR100
    (case-insensitive), or a folder. UserError if it contradicts these flags."""
    name, known = (data_path or "").lower(), {"dataset": dataset, "data": data}
    flag, value = ("dataset", name) if name in ON_DISK else ("data", data_path)
    if value and known[flag] not in (None, value):
        raise UserError(
            f"--{flag} {known[flag]} and --data_path {value} contradict each other: use one of them"
        )
    known[flag] = value or known[flag]
    return known["dataset"], known["data"]


def check_data_path(data_path: str | None) -> None:
    """UserError if ``--data_path`` is a folder that is missing."""
    if data_path and data_path.lower() not in ON_DISK and not Path(data_path).is_dir():
        raise UserError(
            f"there is no folder {data_path}: --data_path is CIFAR10, CIFAR100, or a folder with "
            "train/<class>/ and test/<class>/"
        )


@dataclass(frozen=True)
class CheckpointSettings(NetworkSettings):
    """The checkpoint and, if the file does not record it, its network."""

    in_folder: ClassVar[tuple[str, ...]] = (*TO_PRUNE, "*_base.pth", "*_rebuilt.pth")  # first match

    checkpoint: str | None = setting(
        None, "checkpoint of a network, or its folder", kind="positional", metavar="CHECKPOINT"
    )

    @property
    def path(self) -> Path:
        """The checkpoint file. UserError if none is given."""
        if not self.checkpoint:
            raise UserError("CHECKPOINT is required: the file of a network, or its folder")
        return files.find(Path(self.checkpoint), *self.in_folder)
