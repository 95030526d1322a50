"""Where images come from, and where the work is done."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slimming.data.datasets import NAMES
from slimming.runtime.threads import MOST
from slimming.settings import count, number, setting


def dataset_field(default: str = "", names: tuple[str, ...] = NAMES) -> Any:
    """The field of the data set: what is taken where no checkpoint says, which names there are."""
    text = f"{', '.join(names)} (default: that of the checkpoint{default})"
    return setting(None, text, metavar="NAME", choices=names)


@dataclass(frozen=True)
class DataSettings:
    """A data set, how it is read, and the device.

    ``dataset`` is None where the checkpoint says which, ``image_size`` in pixels too.
    """

    title: ClassVar[str] = "data and device"
    dataset: str | None = dataset_field()
    data: str | None = setting(
        None, "folder of the dataset (default: ./data.<dataset>)", metavar="DIR"
    )
    image_size: int | None = setting(
        None,
        "pixels of an image's side; not 32: streamed from --dataset folder (default: 32)",
        metavar="N",
        parse=count,
    )
    test_batch_size: int = setting(256, "images a step of the evaluation", metavar="N", parse=count)
    workers: int = setting(
        os.cpu_count() or 1,
        "threads or processes that decode image files (default: the number of cores)",
        metavar="N",
        parse=count,
    )
    threads: int | None = setting(
        None,
        "threads of the computation on the CPU (default: PyTorch's choice)",
        metavar="N",
        parse=number(int, 1, MOST),
    )
    device: str | None = setting(
        None, "cpu, cuda, cuda:1, ... (default: cuda if there is one)", metavar="NAME"
    )
    no_cuda: bool = setting(False, "stay on the CPU", kind="switch")

    def folder(self, dataset: str) -> Path:
        """Where ``dataset`` is, or goes when it is downloaded."""
        return Path(self.data or f"./data.{dataset}")
