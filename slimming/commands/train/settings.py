"""The flags of main.py and mask-impl/main_mask.py."""

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from models import NETWORKS, PAPER_DEPTH
from slimming.commands.settings import (
    NetworkSettings,
    arch_field,
    depth_field,
    filename_field,
    resume_field,
    save_field,
)
from slimming.data.datasets import DataSettings, dataset_field
from slimming.errors import UserError
from slimming.settings import count, fraction, number, part, plain_name, setting
from slimming.training.settings import RunFolder, TrainSettings

RATES = {
    "growth_rate": "growthRate",
    "drop_rate": "dropRate",
    "compression_rate": "compressionRate",
}
_DEPTHS = ", ".join(f"{arch} {depth}" for arch, depth in PAPER_DEPTH.items())


def _rate(name: str, text: str, metavar: str, parse: Any) -> Any:
    default = inspect.signature(NETWORKS["densenet"]).parameters[name].default
    text += f" (default: from the checkpoint, else {default})"
    return setting(None, text, metavar=metavar, parse=parse)


@dataclass(frozen=True)
class NewNetworkSettings(NetworkSettings):
    """The network of a training run; without a checkpoint, it has defaults."""

    arch: str | None = arch_field(", else vgg")
    depth: int | None = depth_field(f", else {_DEPTHS}")
    growth_rate: int | None = _rate(
        "growthRate", "number of channels that each densenet block adds", "N", count
    )
    drop_rate: float | None = _rate(
        "dropRate", "dropout probability in densenet blocks", "P", fraction
    )
    compression_rate: float | None = _rate(
        "compressionRate",
        "factor by which densenet transitions reduce channels",
        "R",
        number(float, 1),
    )

    @property
    def options(self) -> dict[str, Any] | None:
        given = {option: getattr(self, name) for name, option in RATES.items()}
        return {name: value for name, value in given.items() if value is not None} or None


@dataclass(frozen=True)
class StartSettings:
    """The checkpoint to start from."""

    refine: str | None = setting(None, "fine-tune this pruned model", metavar="FILE")
    resume: str | None = resume_field()

    def __post_init__(self) -> None:
        if self.refine and self.resume not in (None, "auto"):
            raise UserError(
                "--refine and --resume contradict each other: omit --refine to resume a run, or "
                "use --resume auto, which starts from --refine if --save has no checkpoint yet"
            )


@dataclass(frozen=True)
class OutputSettings:
    """Where a training run writes its results."""

    title: ClassVar[str] = "output"
    save: str | None = save_field(
        "./logs; ./ckpts/<arch>[_sr][_T] with --tag T or --arch preact_res<depth>"
    )
    filename: str | None = filename_field("checkpoint and model_best")
    tag: str | None = setting(
        None, "suffix for the name of the results folder", metavar="T", parse=plain_name
    )
    no_tensorboard: bool = setting(False, "do not write TensorBoard events", kind="switch")


@dataclass(frozen=True)
class TrainingDataSettings(DataSettings):
    """The data of a training run."""

    dataset: str | None = dataset_field(
        ", else cifar10 with --arch preact_res<depth>, else cifar100"
    )


@dataclass(frozen=True)
class TrainingRun:
    """All settings of main.py and mask-impl/main_mask.py."""

    network: NewNetworkSettings = part(NewNetworkSettings)
    start: StartSettings = part(StartSettings)
    train: TrainSettings = part(TrainSettings)
    data: TrainingDataSettings = part(TrainingDataSettings)
    output: OutputSettings = part(OutputSettings)

    def folder(self, arch: str | None = None) -> RunFolder:
        """The folder of the run; ``arch`` is the network if no flag gives it."""
        resumed = self.start.resume
        path: str | Path | None = self.output.save
        if not path and not resumed and (self.output.tag or self.network.spelled_preact):
            name = self.network.arch or arch or "vgg"
            parts = [name, "sr" if self.train.sr else None, self.output.tag]
            path = Path("ckpts") / "_".join(part for part in parts if part)
        return RunFolder(path, self.output.filename, resumed)

    @property
    def named_by_file(self) -> bool:
        """Whether the name of the folder contains the network of the file to fine-tune."""
        output = self.output
        return bool(self.start.refine and output.tag and not output.save and not self.network.arch)

    def starting_from(self, **files: str | None) -> "TrainingRun":
        """The same run with different ``refine`` and ``resume``."""
        return replace(self, start=StartSettings(**files))
