"""The settings of an experiment: all that run.py can be told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from models import PAPER_DEPTH
from slimming.data.datasets import NAMES
from slimming.data.settings import DataSettings, dataset_field
from slimming.errors import UserError
from slimming.pruning.importance import MEASURES
from slimming.settings import (
    build,
    count,
    count_from_zero,
    not_negative,
    number,
    part,
    seed,
    setting,
    share,
)
from slimming.storage import files
from slimming.storage.architecture import Architecture
from slimming.workflows.methods import METHODS
from slimming.workflows.settings import NetworkSettings, architecture_name

_DEPTHS = ", ".join(f"{arch} {depth}" for arch, depth in PAPER_DEPTH.items())
UNTRACKED = tuple(name for name in MEASURES if name != "biased_loss_tracked")  # that takes training
epochs_or_none = number(int, 0, 10**6)


def _worker_count(text: str) -> int:
    """0, which means no workers elsewhere, is 1."""
    return max(1, count_from_zero(text))


@dataclass(frozen=True)
class ModelSettings:
    """The network, and where results go."""

    title: ClassVar[str] = "network and results"
    model: str = setting(
        "resnet18",
        "resnet18, resnet50, vgg16, mobilenet_v3_large, any other classification model of "
        "torchvision, or a network of main.py",
        metavar="NAME",
        parse=architecture_name,
    )
    depth: int | None = setting(
        None, f"depth of the network (default: {_DEPTHS})", metavar="N", parse=count
    )
    weights: str | None = setting(
        None,
        "start from torchvision's weights of this name instead of fresh ones: DEFAULT",
        metavar="NAME",
    )
    output_dir: Path = setting(
        Path("experiments"), "where experiments go", metavar="DIR", parse=Path
    )

    def __post_init__(self) -> None:
        if self.depth and NetworkSettings(arch=self.model).spelled_preact:
            raise UserError(f"--model {self.model} says its depth: leave --depth out")


@dataclass(frozen=True)
class BaseTrainingSettings:
    """How the base network is trained; fine-tuning has epochs and a learning rate of its own."""

    title: ClassVar[str] = "base training"
    base_train_epochs: int = setting(100, "epochs", metavar="N", parse=count)
    learning_rate: float = setting(0.05, "/ 10 at 1/2 and at 3/4", metavar="R", parse=not_negative)
    batch_size: int = setting(128, "images a step", metavar="N", parse=count)
    weight_decay: float = setting(5e-4, "weight decay", metavar="W", parse=not_negative)
    patience: int = setting(
        0,
        "end a training whose top-1 has not risen for N epochs; 0: never",
        metavar="N",
        parse=epochs_or_none,
    )
    s: float = setting(
        1e-4,
        "L1 penalty on the scaling factors, with --pruning-method slimming",
        *("--s", "--sparsity"),
        metavar="S",
        parse=not_negative,
    )
    seed: int = setting(1, "seed of everything", metavar="N", parse=seed)


@dataclass(frozen=True)
class PruningSettings:
    """What goes, how much of it, and how it is chosen."""

    title: ClassVar[str] = "pruning"
    pruning_method: str = setting(
        "channel",
        "channel: whole filters; kernel: k x k kernels; intra-kernel: patterns of weights in "
        "kernels; slimming: channels by scaling factor",
        choices=tuple(METHODS),
    )
    pruning_ratio: float = setting(0.5, "share to remove, 0 <= P < 1", metavar="P", parse=share)
    global_pruning: bool = setting(
        False,
        "one ranking over the whole network; else each layer loses the same share",
        kind="switch",
    )
    importance: str | None = setting(
        None,
        f"of --pruning-method channel: {', '.join(UNTRACKED)} (default: l1; lamp with "
        "--global-pruning, whose ranking needs scores that compare over layers)",
        metavar="M",
        choices=UNTRACKED,
    )
    round_to: int = setting(
        1, "keep a multiple of N channels in each layer", metavar="N", parse=count
    )
    ignore: Sequence[str] = setting(
        (),
        "leave this layer, or the layers inside this module, alone; can be repeated",
        metavar="LAYER",
        kind="list",
    )

    def __post_init__(self) -> None:
        if self.importance and self.pruning_method != "channel":
            raise UserError("--importance is of --pruning-method channel: leave one of them out")
        if self.round_to > 1 and self.masks:
            raise UserError("--round-to is of --pruning-method channel and slimming: leave it out")

    @property
    def masks(self) -> bool:
        """Whether weights become zero inside filters that stay."""
        return "kernel" in self.pruning_method

    @property
    def importance_or_default(self) -> str:
        """``importance``; without it a measure that suits the ranking."""
        return self.importance or ("lamp" if self.global_pruning else "l1")

    @property
    def measure(self) -> str:
        """The measure that scores the channels, by its name in `slimming.pruning.importance`."""
        measures = {"slimming": "bn", "channel": self.importance_or_default}
        return measures.get(self.pruning_method, "l1")


@dataclass(frozen=True)
class FineTuningSettings:
    """How the pruned network is fine-tuned."""

    title: ClassVar[str] = "fine-tuning"
    finetune_epochs: int = setting(20, "epochs; 0: none", metavar="N", parse=epochs_or_none)
    finetune_lr: float = setting(0.01, "/ 10 at 1/2 and at 3/4", metavar="R", parse=not_negative)


@dataclass(frozen=True)
class ExecutionSettings:
    """Which stages run, and what they leave."""

    title: ClassVar[str] = "execution"
    no_fp16: bool = setting(
        False, "train in fp32 (else mixed precision: bf16, fp16 on old GPUs)", kind="switch"
    )
    resume: bool = setting(
        False, "go on with the newest unfinished experiment of these settings", kind="switch"
    )
    skip_base_training: bool = setting(
        False,
        "start from --model-path, --weights, or the newest base model in --output-dir",
        kind="switch",
    )
    skip_pruning: bool = setting(False, "train and report the base model alone", kind="switch")
    eval_only: bool = setting(False, "only evaluate --model-path", kind="switch")
    save_model: bool = setting(
        False, "keep the base model and the last epoch of each training", kind="switch"
    )
    model_path: Path | None = setting(None, "saved network to load", metavar="FILE", parse=Path)

    def __post_init__(self) -> None:
        if self.eval_only and not self.model_path:
            raise UserError("--eval-only needs --model-path FILE, the network to evaluate")
        if self.model_path and not (self.eval_only or self.skip_base_training):
            raise UserError("--model-path goes with --skip-base-training or with --eval-only")


@dataclass(frozen=True)
class ExperimentDataSettings(DataSettings):
    """The data of an experiment: ImageNet too, a folder of larger images."""

    dataset: str | None = dataset_field(", else cifar10", (*NAMES, "imagenet"))
    workers: int = setting(
        DataSettings.workers,
        "threads or processes that decode image files; 0 is 1",
        *("--workers", "--num-workers"),
        metavar="N",
        parse=_worker_count,
    )

    @property
    def name(self) -> str:
        """What the data set is called: it stands in the names of folders."""
        return self.dataset or "cifar10"

    @property
    def source(self) -> DataSettings:
        """What is read; ``dataset`` is None where a checkpoint may say which."""
        if self.dataset != "imagenet":
            return self
        folder, pixels = self.data or "./data.imagenet", self.image_size or 224
        return replace(self, dataset="folder", data=folder, image_size=pixels)


@dataclass(frozen=True)
class ExperimentSettings:
    """All of run.py."""

    network: ModelSettings = part(ModelSettings)
    base: BaseTrainingSettings = part(BaseTrainingSettings)
    pruning: PruningSettings = part(PruningSettings)
    fine_tuning: FineTuningSettings = part(FineTuningSettings)
    execution: ExecutionSettings = part(ExecutionSettings)
    data: ExperimentDataSettings = part(ExperimentDataSettings)

    def asked(self) -> dict[str, Any]:
        """The network that is asked for, see `slimming.workflows.settings.NetworkSettings`."""
        network = NetworkSettings(arch=self.network.model, depth=self.network.depth)
        return network.asked(self.data.source)

    def architecture(self, num_classes: int) -> Architecture:
        """The network where no checkpoint says more of it."""
        asked = self.asked()
        arch, dataset = asked["arch"], asked["dataset"] or self.data.name
        depth = asked["depth"] or PAPER_DEPTH.get(arch)
        pixels = asked["image_size"] or Architecture.image_size
        return Architecture(arch, depth, dataset, num_classes, None, pixels)


def read_settings(typed: Mapping[str, Any]) -> ExperimentSettings:
    """The experiment that was ``typed`` (see `slimming.cli.flags.parse`); of a folder as
    --model-path the network in it. UserError where it contradicts itself."""
    settings = build(ExperimentSettings, typed)
    path = settings.execution.model_path
    if path is None:
        return settings
    path = files.find(path, "*_rebuilt.pth", "model_best.pth.tar")
    return build(ExperimentSettings, {**typed, "model_path": path})
