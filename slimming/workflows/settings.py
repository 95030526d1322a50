"""Settings that scripts share: the network, the checkpoint to start from, the output."""

import inspect
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from models import NETWORKS, PAPER_DEPTH, constructor
from slimming.data.datasets import ON_DISK
from slimming.data.settings import DataSettings, dataset_field
from slimming.errors import UserError
from slimming.pruning.allocation import allocation_name
from slimming.pruning.choice import LEAST
from slimming.settings import count, fraction, number, part, plain_name, setting
from slimming.training.run_folder import RunFolder
from slimming.training.settings import TrainSettings
from slimming.workflows.budgets import BudgetSettings
from slimming.workflows.repairing import RepairSettings
from slimming.workflows.rounding import round_to_field

PREACT = "preact_res"  # preact_res20 is the name of another suite for resnet with depth 20
RATES = {
    "growth_rate": "growthRate",
    "drop_rate": "dropRate",
    "compression_rate": "compressionRate",
}
_DEPTHS = ", ".join(f"{arch} {depth}" for arch, depth in PAPER_DEPTH.items())


def architecture_name(text: str) -> str:
    """The name of a network of this suite or of torchvision, or preact_res<depth>."""
    if not re.fullmatch(rf"{PREACT}\d{{1,4}}", text) and constructor(text) is None:
        raise ValueError(
            f"unknown network {text!r}: use {', '.join(NETWORKS)}, {PREACT}<depth>, or the name of "
            "a classification model of torchvision"
        )
    return text


def _arch(default: str = "") -> Any:
    names = f"{', '.join(NETWORKS)}, {PREACT}<depth>, or the name of a classification model of "
    names += f"torchvision (default: from the checkpoint{default})"
    return setting(None, names, metavar="NAME", parse=architecture_name)


def _depth(default: str = "") -> Any:
    text = f"depth of the network (default: from the checkpoint{default})"
    return setting(None, text, metavar="N", parse=count)


def _rate(name: str, text: str, metavar: str, parse: Any) -> Any:
    default = inspect.signature(NETWORKS["densenet"]).parameters[name].default
    text += f" (default: from the checkpoint, else {default})"
    return setting(None, text, metavar=metavar, parse=parse)


@dataclass(frozen=True)
class NetworkSettings:
    """The requested network; None if the checkpoint decides."""

    arch: str | None = _arch()
    depth: int | None = _depth()

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

    def asked(self, data: DataSettings, **more: Any) -> dict[str, Any]:
        """The requested network, for `slimming.storage.architecture.describe`."""
        arch, depth = self.arch, self.depth
        if self.spelled_preact:
            arch, depth = "resnet", self._depth_of_name
        asked = {"arch": arch, "depth": depth, "options": self.options, "spelled": self.arch}
        return {**asked, "dataset": data.dataset, "image_size": data.image_size, **more}


@dataclass(frozen=True)
class NewNetworkSettings(NetworkSettings):
    """The network of a training run; without a checkpoint, it has defaults."""

    arch: str | None = _arch(", else vgg")
    depth: int | None = _depth(f", else {_DEPTHS}")
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


def resume_field() -> Any:
    """The field of the checkpoint to resume from."""
    text = "resume from this checkpoint, with its settings; auto: the last one in --save, if any"
    return setting(None, text, metavar="FILE")


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


def allocation_field(default: str | None, more: str = "") -> Any:
    """The field of how the fraction to prune is allocated to the layers."""
    text = "which layers lose the channels with the smallest |γ|: global, one threshold over the "
    text += "network; uniform, all alike; lamp, by LAMP scores; random-N, a candidate of sweep.py"
    return setting(default, text + more, metavar="A", parse=allocation_name)


def least_field(default: float = LEAST) -> Any:
    """The field of the fraction of its channels that each layer keeps."""
    text = "each layer keeps at least this fraction of its channels, or 1 - P if that is less"
    text += "; 0: one channel"
    text += "" if default else ", as in the paper"
    return setting(default, text, metavar="F", parse=number(float, 0, 1))


@dataclass(frozen=True)
class PruneSettings:
    """What the pruning scripts prune, and how much."""

    model: str | None = setting(
        None, "checkpoint to prune, or a folder with the best model", metavar="FILE"
    )
    ratio: float | None = setting(
        None,
        "fraction of the channels to prune, 0 <= P < 1 (default: 0.5)",
        "--percent",
        metavar="P",
        parse=fraction,
    )
    allocation: str = allocation_field("global", " (default: global)")
    least: float = least_field(0.0)
    round_to: int | Literal["auto"] = round_to_field()


@dataclass(frozen=True)
class PrunedOutputSettings:
    """Where a pruned network is written."""

    title: ClassVar[str] = "output"
    save: str | None = save_field("the folder of the model")
    filename: str | None = filename_field("pruned")


@dataclass(frozen=True)
class PruningRun:
    """All settings of the pruning scripts."""

    prune: PruneSettings = part(PruneSettings)
    budget: BudgetSettings = part(BudgetSettings)
    network: NetworkSettings = part(NetworkSettings)
    repairing: RepairSettings = part(RepairSettings)
    data: DataSettings = part(DataSettings)
    output: PrunedOutputSettings = part(PrunedOutputSettings)

    def __post_init__(self) -> None:
        if self.prune.ratio is not None:
            self.budget.replaces("--percent")
