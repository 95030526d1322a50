"""The flags of run.py."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

from models import NETWORKS, PAPER_DEPTH, zoo
from slimming.choosing.importance import MEASURES
from slimming.choosing.threshold import LEAST
from slimming.commands.experiment.methods import METHODS
from slimming.commands.pruning import (
    BudgetSettings,
    RepairSettings,
    allocation_field,
    least_field,
    round_to_field,
)
from slimming.commands.settings import NetworkSettings, architecture_name
from slimming.data.batches import SIZE
from slimming.data.datasets import NAMES, DataSettings, dataset_field
from slimming.errors import UserError
from slimming.settings import (
    build,
    count,
    count_from_zero,
    fraction,
    not_negative,
    number,
    part,
    seed,
    setting,
)
from slimming.storage import files
from slimming.storage.architecture import Architecture, Request
from slimming.storage.checkpoint import Contents
from slimming.storage.preprocessing import CIFAR, IMAGENET, Preprocessing

_DEPTHS = ", ".join(f"{arch} {depth}" for arch, depth in PAPER_DEPTH.items())
UNTRACKED = tuple(name for name in MEASURES if name != "biased_loss_tracked")  # needs training
IMAGENET_SIZE = 224
epochs_or_none = number(int, 0, 10**6)


def _worker_count(text: str) -> int:
    """An integer; 0, which means no workers in other programs, becomes 1."""
    return max(1, count_from_zero(text))


@dataclass(frozen=True)
class ModelSettings:
    """The network, and the folder of the results."""

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
        "start from these weights of torchvision instead of random ones, such as DEFAULT; images "
        "are normalised and, in folders, resized as the weights expect",
        metavar="NAME",
    )
    output_dir: Path = setting(
        Path("experiments"), "folder of all experiments", metavar="DIR", parse=Path
    )

    def __post_init__(self) -> None:
        if self.depth and NetworkSettings(arch=self.model).spelled_preact:
            raise UserError(f"--model {self.model} implies its depth: omit --depth")


@dataclass(frozen=True)
class BaseTrainingSettings:
    """How the base network is trained; fine-tuning has its own epochs and learning rate."""

    title: ClassVar[str] = "base training"
    base_train_epochs: int = setting(100, "number of epochs", metavar="N", parse=count)
    learning_rate: float = setting(
        0.05,
        "learning rate, divided by 10 after 1/2 and 3/4 of the epochs",
        metavar="R",
        parse=not_negative,
    )
    batch_size: int = setting(128, "batch size", metavar="N", parse=count)
    weight_decay: float = setting(5e-4, "weight decay", metavar="W", parse=not_negative)
    patience: int = setting(
        0,
        "stop training when top-1 has not improved for N epochs; 0: never",
        metavar="N",
        parse=epochs_or_none,
    )
    s: float = setting(
        1e-4,
        "strength of the L1 penalty on the scaling factors, for --pruning-method slimming",
        *("--s", "--sparsity"),
        metavar="S",
        parse=not_negative,
    )
    seed: int = setting(1, "random seed", metavar="N", parse=seed)


@dataclass(frozen=True)
class PruningSettings:
    """What is pruned, how much of it, and how it is chosen."""

    title: ClassVar[str] = "pruning"
    pruning_method: str = setting(
        "channel",
        "channel: remove whole filters; kernel: zero k x k kernels; intra-kernel: zero weights "
        "inside kernels, in patterns; slimming: remove channels by scaling factor",
        choices=tuple(METHODS),
    )
    pruning_ratio: float = setting(
        0.5, "fraction to prune, 0 <= P < 1", metavar="P", parse=fraction
    )
    global_pruning: bool = setting(
        False,
        "rank over the whole network; by default each layer loses the same fraction",
        kind="switch",
    )
    importance: str | None = setting(
        None,
        f"measure for --pruning-method channel: {', '.join(UNTRACKED)} (default: l1, or lamp with "
        "--global-pruning, which needs scores that are comparable between layers)",
        metavar="M",
        choices=UNTRACKED,
    )
    allocation: str | None = allocation_field(
        None, " (instead of --global-pruning and --importance)"
    )
    least: float = least_field(LEAST)
    round_to: int | Literal["auto"] = round_to_field(1)
    ignore: Sequence[str] = setting(
        (),
        "do not prune this layer, or the layers inside this module; can be repeated",
        metavar="LAYER",
        kind="list",
    )

    def __post_init__(self) -> None:
        if self.importance and self.pruning_method != "channel":
            raise UserError("--importance needs --pruning-method channel: omit one of them")
        if self.allocation and (self.importance or self.global_pruning):
            other = "--importance" if self.importance else "--global-pruning"
            raise UserError(f"--allocation and {other} contradict each other: use one of them")
        if self.allocation and self.masks:
            raise UserError("--allocation needs --pruning-method channel or slimming: omit it")
        if self.round_to != 1 and self.masks:
            raise UserError("--round-to needs --pruning-method channel or slimming: omit it")
        if self.least != LEAST and self.masks:
            raise UserError("--least needs --pruning-method channel or slimming: omit it")

    @property
    def masks(self) -> bool:
        """Whether weights are set to zero inside filters that are kept."""
        return "kernel" in self.pruning_method

    @property
    def importance_or_default(self) -> str:
        """``importance``, or by default a measure that suits the ranking."""
        return self.importance or ("lamp" if self.global_pruning else "l1")

    @property
    def measure(self) -> str:
        """The measure that scores the channels, by its name in `slimming.choosing.importance`."""
        measures = {"slimming": "bn", "channel": self.importance_or_default}
        return measures.get(self.pruning_method, "l1")


@dataclass(frozen=True)
class FineTuningSettings:
    """How the pruned network is fine-tuned."""

    title: ClassVar[str] = "fine-tuning"
    finetune_epochs: int = setting(
        20, "number of epochs; 0: no fine-tuning", metavar="N", parse=epochs_or_none
    )
    finetune_lr: float = setting(
        0.01,
        "learning rate, divided by 10 after 1/2 and 3/4 of the epochs",
        metavar="R",
        parse=not_negative,
    )


@dataclass(frozen=True)
class ExecutionSettings:
    """Which stages run, and which files they keep."""

    title: ClassVar[str] = "execution"
    no_fp16: bool = setting(
        False,
        "train in fp32 instead of mixed precision (bf16, or fp16 on older GPUs)",
        kind="switch",
    )
    resume: bool = setting(
        False, "continue the latest unfinished experiment with these settings", kind="switch"
    )
    skip_base_training: bool = setting(
        False,
        "start from --model-path, --weights, or the latest base model with these settings in "
        "--output-dir",
        kind="switch",
    )
    skip_pruning: bool = setting(False, "only train and report the base model", kind="switch")
    eval_only: bool = setting(False, "only evaluate --model-path", kind="switch")
    save_model: bool = setting(
        False, "keep the base model and the last epoch of each training", kind="switch"
    )
    model_path: Path | None = setting(None, "checkpoint to load", metavar="FILE", parse=Path)

    def __post_init__(self) -> None:
        if self.eval_only and not self.model_path:
            raise UserError("--eval-only needs the network to evaluate: add --model-path FILE")
        if self.model_path and not (self.eval_only or self.skip_base_training):
            raise UserError("--model-path needs --skip-base-training or --eval-only: add one")


@dataclass(frozen=True)
class ExperimentDataSettings(DataSettings):
    """The data of an experiment, including ImageNet, a folder of larger images."""

    dataset: str | None = dataset_field(", else cifar10", (*NAMES, "imagenet"))
    workers: int = setting(
        DataSettings.workers,
        "number of threads or processes that decode image files; 0 means 1 (default: number of "
        "CPU cores)",
        *("--workers", "--num-workers"),
        metavar="N",
        parse=_worker_count,
    )

    @property
    def name(self) -> str:
        """The name of the dataset, as in the names of folders."""
        return self.dataset or "cifar10"

    @property
    def source(self) -> DataSettings:
        """The data to load; ``dataset`` is None if the checkpoint may give it."""
        if self.dataset != "imagenet":
            return self
        return replace(self, dataset="folder", data=self.data or "./data.imagenet")


@dataclass(frozen=True)
class ExperimentSettings:
    """All of run.py."""

    network: ModelSettings = part(ModelSettings)
    base: BaseTrainingSettings = part(BaseTrainingSettings)
    pruning: PruningSettings = part(PruningSettings)
    budget: BudgetSettings = part(BudgetSettings)
    repairing: RepairSettings = part(RepairSettings)
    fine_tuning: FineTuningSettings = part(FineTuningSettings)
    execution: ExecutionSettings = part(ExecutionSettings)
    data: ExperimentDataSettings = part(ExperimentDataSettings)

    def __post_init__(self) -> None:
        if self.network.weights and self.execution.model_path:
            raise UserError("--weights and --model-path both give the weights: use one of them")
        if self.repairing.repair and self.pruning.masks:
            raise UserError("--repair needs --pruning-method channel or slimming: omit it")
        if self.execution.skip_pruning and (self.repairing.repair or self.budget.given):
            flag = "--repair" if self.repairing.repair else next(iter(self.budget.given))
            raise UserError(f"--skip-pruning and {flag} contradict each other: omit one of them")
        if self.budget.given and self.pruning.masks:
            raise UserError("a budget needs --pruning-method channel or slimming: omit it")

    def request(self, contents: Contents | None = None) -> Request:
        """What the flags ask of the network; the ``contents`` of its checkpoint, if any, say the
        size that was not asked for."""
        network = NetworkSettings(arch=self.network.model, depth=self.network.depth)
        request = network.request(self.data.source)
        size, preprocessing = self._input(request.arch or "")
        size = self.data.image_size or (contents or {}).get("image_size") or size
        return replace(request, image_size=size, preprocessing=preprocessing)

    def _input(self, arch: str) -> tuple[int, Preprocessing]:
        """The image size and preprocessing of a base network without a checkpoint: those of its
        pretrained weights, if it starts from any. Only pictures in a folder come in any size."""
        imagenet, execution = self.data.dataset == "imagenet", self.execution
        size, preprocessing = (IMAGENET_SIZE, IMAGENET) if imagenet else (SIZE, CIFAR)
        weights = self.network.weights or ("DEFAULT" if execution.skip_base_training else None)
        if weights is None or execution.model_path or arch in NETWORKS or arch not in zoo.names():
            return size, preprocessing
        with contextlib.suppress(ValueError):  # unknown weights are an error when they are loaded
            preset = zoo.transforms(arch, weights)
            (own,), (side,) = preset.crop_size, preset.resize_size
            preprocessing = Preprocessing(
                tuple(preset.mean),
                tuple(preset.std),
                Fraction(own, side).as_integer_ratio(),
                preset.interpolation.value,
            )
            size = own if self.data.source.dataset == "folder" else size
        return size, preprocessing

    def architecture(self, num_classes: int) -> Architecture:
        """The network, if there is no checkpoint that describes it."""
        request = self.request()
        depth = request.depth or PAPER_DEPTH.get(request.arch or "")
        dataset = request.dataset or self.data.name
        request = replace(request, depth=depth, dataset=dataset, num_classes=num_classes)
        return request.architecture()


def read_settings(typed: Mapping[str, Any]) -> ExperimentSettings:
    """The settings from the ``typed`` flags (see `slimming.cli.flags.parse`). If --model-path is a
    folder, it becomes the network in it. UserError if flags contradict each other."""
    settings = build(ExperimentSettings, typed)
    if "pruning_ratio" in typed:
        settings.budget.replaces("--pruning-ratio")
    path = settings.execution.model_path
    if path is None:
        return settings
    path = files.find(path, "*_rebuilt.pth", "model_best.pth.tar")
    return build(ExperimentSettings, {**typed, "model_path": path})
