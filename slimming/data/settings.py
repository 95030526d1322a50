"""Settings of the data and the device."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slimming.data.datasets import NAMES
from slimming.runtime.threads import MAX_THREADS
from slimming.settings import count, number, setting


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
