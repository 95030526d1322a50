"""The flags of eval.py."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from slimming.commands.settings import TO_PRUNE, NetworkSettings, architecture_name, split_data_path
from slimming.data.datasets import DataSettings
from slimming.errors import UserError
from slimming.settings import count, part, setting
from slimming.storage import files

IN_FOLDER = (*TO_PRUNE, "*_rebuilt.pth", "*_pruned.pth", "*_base.pth")  # the first match is used
SWITCHES = ("--train_acc", "--test_acc", "--flops", "--compression", "--pruned", "--download")


def _switch(text: str, flag: str, default: bool | None = False) -> Any:
    return setting(default, text, flag, kind="bool")


@dataclass(frozen=True)
class SubjectSettings(NetworkSettings):
    """The checkpoint and its network: values that the file does not record, or that are checked
    against it."""

    checkpoint: str | None = setting(
        None, "checkpoint file, or its folder", kind="positional", metavar="CHECKPOINT"
    )
    model_path: str | None = setting(None, "the same as CHECKPOINT", "--model_path", metavar="FILE")
    arch: str | None = setting(
        None,
        "vgg, mobilenet, resnet, resnet-56, ... (default: from the checkpoint)",
        *("--model", "--arch"),
        metavar="NAME",
        parse=architecture_name,
    )
    depth: int | None = setting(
        None, "depth, if the file does not record it", metavar="N", parse=count
    )
    num_classes: int | None = setting(
        None,
        "number of outputs of the network, checked if given",
        "--num_classes",
        metavar="N",
        parse=count,
    )
    pruned: bool | None = _switch("True: an error if the network is not pruned", "--pruned", None)

    @property
    def path(self) -> Path:
        """The checkpoint file. UserError if none is given, or two are."""
        given = [path for path in (self.checkpoint, self.model_path) if path]
        if len(given) != 1:
            raise UserError("give one checkpoint, as CHECKPOINT or as --model_path FILE")
        return files.find(Path(given[0]), *IN_FOLDER)


@dataclass(frozen=True)
class AnswerSettings:
    """The figures to print. Without any of these: everything except the training accuracy."""

    title: ClassVar[str] = "what to print (default: all except --train_acc)"
    train_acc: bool = _switch("top-1 and loss on the training images", "--train_acc")
    test_acc: bool = _switch("top-1 and loss on the test images", "--test_acc")
    flops: bool = _switch("FLOPs (2 x multiply-accumulates) per image; needs no data", "--flops")
    compression: bool = _switch(
        "ratio of the dense network's size to this one's; needs no data", "--compression"
    )
    json: bool = setting(False, "print one JSON object", kind="switch")

    @property
    def everything(self) -> bool:
        return not (self.train_acc or self.test_acc or self.flops or self.compression)


@dataclass(frozen=True)
class EvaluationDataSettings(DataSettings):
    """The data, which can also be given by ``data_path``."""

    data_path: str | None = setting(
        None, "CIFAR10, CIFAR100, or the folder of the dataset", "--data_path", metavar="DIR"
    )
    download: bool = _switch("download CIFAR if it is missing", "--download")

    def resolved(self, recorded: str | None) -> "EvaluationDataSettings":
        """The same with ``data_path`` resolved to ``dataset`` and ``data``; ``recorded``: the
        dataset of the checkpoint."""
        dataset, data = split_data_path(self.data_path, self.dataset, self.data)
        if self.data_path:
            dataset = dataset or recorded or "folder"
        return replace(self, dataset=dataset, data=data)


@dataclass(frozen=True)
class EvaluationRun:
    """All of eval.py."""

    subject: SubjectSettings = part(SubjectSettings)
    answers: AnswerSettings = part(AnswerSettings)
    data: EvaluationDataSettings = part(EvaluationDataSettings)
