"""The flags of flowprune.py."""

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from models import NETWORKS, PAPER_DEPTH
from slimming.choosing.importance import MEASURES, TEMPERATURES
from slimming.commands.pruning import RepairSettings
from slimming.commands.settings import (
    check_data_path,
    filename_field,
    resume_field,
    save_field,
    split_data_path,
)
from slimming.data.datasets import ON_DISK, DataSettings, dataset_field
from slimming.errors import UserError
from slimming.settings import (
    boolean,
    build,
    count,
    flat,
    fraction,
    not_negative,
    number,
    part,
    seed,
    setting,
)
from slimming.storage.architecture import Request
from slimming.storage.checkpoint import Contents
from slimming.training.settings import RunFolder, TrainSettings
from slimming.training.trainer import learning_rate

MODELS = tuple(NETWORKS)
DEPTHS = {**PAPER_DEPTH, "vgg": 13}  # the depth in Lubana and Dick
FULL_RATE_EPOCHS = 80  # of 160: warm-up and rounds must end while the learning rate is full
MAX_PERCENT = 95  # percent of all filters, and of the channels of any layer; more with --bypass
_DEPTHS = ", ".join(f"{model} {depth}" for model, depth in DEPTHS.items())


def switch(text: str, *flags: str, kept: bool = True) -> Any:
    """The field of a switch that also takes True or False, as in the original."""
    return setting(False, text, *flags, kind="bool", kept=kept)


def thresholds(text: str) -> str:
    """A list of increasing percentages, as text."""
    try:
        steps = json.loads(text) if text else []
        good = all(0 <= a < b < 100 for a, b in zip([0, *steps], [*steps], strict=False))
        good = good and (not text or (isinstance(steps, list) and len(steps) > 0))
    except (ValueError, TypeError):
        good = False
    if not good:
        raise ValueError(f"must be increasing percentages like [10,50,80], not {text!r}")
    return text


def _switch_or_count(text: str) -> bool | int:
    return boolean(text) if text.lower() in ("true", "false") else count(text)


def _switch_or_count_field(value: bool | int) -> str:
    return "track_importance" if isinstance(value, bool) else "track_batches"


@dataclass(frozen=True)
class RoundsSettings:
    """A network, and the fraction of its filters that is pruned after each round.

    ``thresholds`` override ``n_rounds`` and ``prune_percent``.
    """

    title: ClassVar[str] = "network and pruning"
    model: str = setting("resnet-56", "network to prune", choices=MODELS, kept=True)
    depth: int | None = setting(
        None,
        f"depth of the network (default: from the checkpoint, else {_DEPTHS})",
        metavar="N",
        parse=count,
    )
    pretrained_path: str = setting(
        "0",
        "start from this checkpoint of main.py instead of random weights (default: none)",
        "--pretrained_path",
        metavar="FILE",
    )
    pruning_type: str = setting(
        "mag_based",
        f"measure of importance: {', '.join(MEASURES)}",
        "--pruning_type",
        metavar="M",
        choices=tuple(MEASURES),
        kept=True,
    )
    prune_percent: float = setting(
        75.0,
        f"percentage of the filters to prune, 0 to {MAX_PERCENT}",
        "--prune_percent",
        metavar="P",
        parse=number(float, 0, 100, below=True),
        kept=True,
    )
    n_rounds: int = setting(
        1,
        "number of rounds: epochs that start with pruning",
        "--n_rounds",
        metavar="N",
        parse=count,
        kept=True,
    )
    thresholds: str = setting(
        "",
        "percentage of the filters pruned after each round, such as [10,50,80] (default: equal "
        "steps)",
        metavar="LIST",
        parse=thresholds,
        kept=True,
    )
    warmup_epochs: int = setting(
        0,
        "epochs of training before the first round",
        "--warmup_epochs",
        metavar="N",
        parse=number(int, 0, 10**6),
        kept=True,
    )
    bypass: bool = switch(
        f"lift the limits: {MAX_PERCENT} % of all filters and of any layer, {FULL_RATE_EPOCHS} "
        "epochs with the full learning rate, T = 1 for grad_preserve"
    )

    def __post_init__(self) -> None:
        if self.thresholds:
            percents = json.loads(self.thresholds)
            object.__setattr__(self, "n_rounds", len(percents))
            object.__setattr__(self, "prune_percent", float(percents[-1]))

    @property
    def epochs(self) -> range:
        """The epochs that start with a round."""
        return range(self.warmup_epochs, self.warmup_epochs + self.n_rounds)

    @property
    def label(self) -> str:
        """The name of the results folder."""
        return f"{self.model}_{self.pruning_type}_{self.prune_percent:g}"

    def removed(self, rounds: int) -> float:
        """The fraction of the original filters that is pruned after this many ``rounds``."""
        if self.thresholds:
            return json.loads(self.thresholds)[rounds - 1] / 100
        return self.prune_percent / 100 * rounds / self.n_rounds


@dataclass(frozen=True)
class ImportanceSettings:
    """How the importance of filters is measured."""

    title: ClassVar[str] = "importance"
    T: float = setting(
        5.0,
        "temperature of the loss, in training and for importance",
        metavar="T",
        parse=number(float, 1e-6),
        kept=True,
    )
    grasp_T: float = setting(
        200.0,
        "temperature for GraSP",
        "--grasp_T",
        metavar="T",
        parse=number(float, 1e-6),
        kept=True,
    )
    imp_samples: int = setting(
        2560,
        "number of training images for importance",
        "--imp_samples",
        metavar="N",
        parse=count,
        kept=True,
    )
    track_importance: bool = switch(
        "average importance over minibatches of training instead", "--track_importance"
    )
    track_batches: int = setting(
        20,
        "number of minibatches to average over, the last ones of an epoch (default: 20); True or "
        "False: same as --track_importance",
        "--track_batches",  # in the original, both a switch and a number
        metavar="N",
        parse=_switch_or_count,
        field_of=_switch_or_count_field,
        kept=True,
    )
    alpha: float = setting(
        0.8, "decay of the moving average", metavar="A", parse=fraction, kept=True
    )
    use_l2: bool = switch("bias importance towards pruning small weights", "--use_l2")
    use_init: bool = switch(
        "bias importance towards pruning weights near their initial value", "--use_init"
    )

    def __post_init__(self) -> None:
        if self.use_l2 and self.use_init:
            raise UserError("--use_l2 and --use_init contradict each other: use one of them")


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

    def request(self, contents: Contents) -> Request:
        """What the flags ask of the network; ``contents`` of its checkpoint, if any."""
        rounds, data, depth = self.rounds, self.data, self.rounds.depth
        if not contents:
            depth = depth or DEPTHS.get(rounds.model)
        size, classes = data.image_size, data.num_classes
        return Request(rounds.model, depth, data.dataset, classes, image_size=size)
