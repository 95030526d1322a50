"""Settings of flowprune.py."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from slimming.data.datasets import ON_DISK
from slimming.data.settings import DataSettings, dataset_field
from slimming.errors import UserError
from slimming.pruning.importance import TEMPERATURES
from slimming.settings import build, count, flat, fraction, not_negative, part, seed, setting
from slimming.training.optimizer import learning_rate
from slimming.training.run_folder import RunFolder
from slimming.training.settings import TrainSettings
from slimming.workflows.repairing import RepairSettings
from slimming.workflows.rounds_settings import (
    DEPTHS,
    FULL_RATE_EPOCHS,
    MAX_PERCENT,
    ImportanceSettings,
    RoundsSettings,
    switch,
)
from slimming.workflows.settings import (
    check_data_path,
    filename_field,
    resume_field,
    save_field,
    split_data_path,
)

LR = 0.1
FOLDER = "pruned_nets"


@dataclass(frozen=True)
class FlowTrainSettings:
    """Training before, between and after the rounds."""

    title: ClassVar[str] = "training"
    epochs: int = setting(
        160,
        "number of epochs in total; the learning rate is 0.1 in the first half, 0.01 in the third "
        "quarter, and 0.001 in the last",
        metavar="N",
        parse=count,
        kept=True,
    )
    lr_prune: float = setting(
        LR,
        "learning rate during the rounds",
        "--lr_prune",
        metavar="R",
        parse=not_negative,
        kept=True,
    )
    moment: float = setting(0.9, "momentum of SGD", metavar="M", parse=fraction, kept=True)
    preserve_moment: bool = switch(
        "keep the momentum of the remaining channels after a round", "--preserve_moment"
    )
    batch_size: int = setting(
        128, "batch size of all processes", metavar="N", parse=count, kept=True
    )
    weight_decay: float = setting(1e-4, "weight decay", metavar="W", parse=not_negative, kept=True)
    seed: int = setting(0, "random seed", metavar="N", parse=seed, kept=True)
    log_interval: int = setting(100, "print a line every N batches", metavar="N", parse=count)
    amp: bool = setting(
        False, "mixed precision: bf16, or fp16 on older GPUs", kind="on/off", kept=True
    )
    deterministic: bool = setting(False, "deterministic CUDA kernels", kind="on/off", kept=True)
    resume: str | None = resume_field()

    @property
    def settings(self) -> TrainSettings:
        """These settings as those of a `Trainer`."""
        return build(TrainSettings, flat(self) | {"lr": LR, "momentum": self.moment})


@dataclass(frozen=True)
class FlowDataSettings(DataSettings):
    """The data, which can also be given by ``data_path``."""

    dataset: str | None = dataset_field(", else from --data_path")
    data_path: str | None = setting(
        None,
        "CIFAR10, CIFAR100, or a folder with train/ and test/ (default: CIFAR100)",
        "--data_path",
        metavar="DIR",
    )
    download: bool = switch("download CIFAR if it is missing", kept=False)
    num_classes: int | None = setting(
        None,
        "number of outputs of the network, at least the number of classes (default: the number of "
        "classes)",
        "--num_classes",
        metavar="N",
        parse=count,
    )

    def resolved(self, known: bool) -> "FlowDataSettings":
        """The same with ``data_path`` resolved to ``dataset`` and ``data``. ``known``: a checkpoint
        gives the dataset. UserError if CIFAR is missing and not to be downloaded."""
        known = known or self.dataset is not None
        path = self.data_path or (None if known else "CIFAR100")
        dataset, data = split_data_path(path, self.dataset, self.data)
        check_data_path(path)
        if known:
            return replace(self, dataset=dataset, data=data)
        name = dataset or "folder"
        resolved = replace(self, dataset=name, data=data)
        folder = resolved.folder(name)
        if dataset and not self.download and not (folder / ON_DISK[dataset]).is_dir():
            raise UserError(
                f"{path} is not in {folder}: add --download True, set --data to its folder, or try "
                "--dataset digits"
            )
        return resolved


@dataclass(frozen=True)
class FlowOutputSettings:
    """Where results are written."""

    title: ClassVar[str] = "output"
    save: str | None = save_field(f"./{FOLDER}/<model>_<measure>_<percent>")
    filename: str | None = filename_field("checkpoint")
    track_stats: bool = switch("write stats.json", "--track_stats")
    no_tensorboard: bool = setting(False, "do not write TensorBoard events", kind="switch")

    def folder(self, label: str, resume: str | None = None) -> RunFolder:
        """The folder of the run ``label``, or of the checkpoint to resume."""
        return RunFolder(
            self.save or (None if resume else f"{FOLDER}/{label}"), self.filename, resume
        )


@dataclass(frozen=True)
class FlowRun:
    """All of flowprune.py."""

    rounds: RoundsSettings = part(RoundsSettings)
    importance: ImportanceSettings = part(ImportanceSettings)
    repairing: RepairSettings = part(RepairSettings)
    train: FlowTrainSettings = part(FlowTrainSettings)
    data: FlowDataSettings = part(FlowDataSettings)
    output: FlowOutputSettings = part(FlowOutputSettings)

    def __post_init__(self) -> None:
        rounds, epochs = self.rounds, self.train.epochs
        limit = epochs if rounds.bypass else max(1, FULL_RATE_EPOCHS * epochs // 160)
        if rounds.epochs.stop > limit:
            raise UserError(
                f"--warmup_epochs and --n_rounds take {rounds.epochs.stop} epochs, but --epochs "
                f"{epochs} has only {limit} with the full learning rate: use fewer, or --bypass"
            )
        if rounds.prune_percent > MAX_PERCENT and not rounds.bypass:
            percent = f"{rounds.prune_percent:g}"
            raise UserError(
                f"--prune_percent must be at most {MAX_PERCENT} without --bypass, not {percent}"
            )

    @property
    def folder(self) -> RunFolder:
        """The folder of the run."""
        return self.output.folder(self.rounds.label, self.train.resume)

    @property
    def tracks(self) -> bool:
        """Whether importance is averaged during the epoch before each round."""
        return self.importance.track_importance or self.rounds.pruning_type == "biased_loss_tracked"

    @property
    def temperature(self) -> float:
        """The temperature of the loss for importance: --grasp_T for GraSP; 1 for grad_preserve, as
        in its paper, unless --bypass."""
        measure = self.rounds.pruning_type
        if measure == "grasp":
            return self.importance.grasp_T
        T = self.importance.T
        return T if self.rounds.bypass else TEMPERATURES.get(measure, T)

    def learning_rate(self, epoch: int) -> float:
        """--lr_prune during the rounds; otherwise 0.1, 0.01 and 0.001 in the first half, the third
        quarter and the last quarter of --epochs."""
        if epoch in self.rounds.epochs:
            return self.train.lr_prune
        return learning_rate(epoch, self.train.epochs, LR)

    def asked(self, contents: Mapping[str, Any]) -> dict[str, Any]:
        """The requested network, for `slimming.storage.architecture.describe`; ``contents`` of its
        checkpoint, if any."""
        rounds, data, depth = self.rounds, self.data, self.rounds.depth
        if not contents:
            depth = depth or DEPTHS.get(rounds.model)
        asked = {"arch": rounds.model, "depth": depth, "num_classes": data.num_classes}
        return {**asked, "dataset": data.dataset, "image_size": data.image_size}
