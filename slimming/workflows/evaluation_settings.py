"""What eval.py is told."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from slimming.data.settings import DataSettings
from slimming.errors import UserError
from slimming.settings import count, part, setting
from slimming.storage import files
from slimming.workflows.before_after import TO_PRUNE
from slimming.workflows.settings import NetworkSettings, architecture_name, split_data_path

IN_FOLDER = (*TO_PRUNE, "*_rebuilt.pth", "*_pruned.pth", "*_base.pth")  # the first that is there
SWITCHES = ("--train_acc", "--test_acc", "--flops", "--compression", "--pruned", "--download")


def _truth(text: str, flag: str, default: bool | None = False) -> Any:
    return setting(default, text, flag, kind="truth")


@dataclass(frozen=True)
class SubjectSettings(NetworkSettings):
    """The checkpoint and the network in it: what the file does not say, and what is checked where
    it does."""

    checkpoint: str | None = setting(
        None, "file or its folder", kind="positional", metavar="CHECKPOINT"
    )
    model_path: str | None = setting(None, "the same as CHECKPOINT", "--model_path", metavar="FILE")
    arch: str | None = setting(
        None,
        "vgg, mobilenet, resnet, resnet-56, ... (default: that of the checkpoint)",
        *("--model", "--arch"),
        metavar="NAME",
        parse=architecture_name,
    )
    depth: int | None = setting(
        None, "depth, where the file does not say", metavar="N", parse=count
    )
    num_classes: int | None = setting(
        None, "outputs of the network, checked if given", "--num_classes", metavar="N", parse=count
    )
    pruned: bool | None = _truth("whether it is pruned, checked if given", "--pruned", None)

    @property
    def path(self) -> Path:
        """The checkpoint's file. UserError if there is none, or two were named."""
        named = [path for path in (self.checkpoint, self.model_path) if path]
        if len(named) != 1:
            raise UserError("one checkpoint is needed: CHECKPOINT or --model_path FILE")
        return files.find(Path(named[0]), *IN_FOLDER)


@dataclass(frozen=True)
class AnswerSettings:
    """What is asked. Without any of these: everything but the accuracy in training."""

    title: ClassVar[str] = "what to tell (default: all but --train_acc)"
    train_acc: bool = _truth("top-1 and loss on the training images", "--train_acc")
    test_acc: bool = _truth("top-1 and loss on the test images", "--test_acc")
    flops: bool = _truth("FLOPs (2 x multiply-accumulates) of an image; needs no data", "--flops")
    compression: bool = _truth(
        "size of the dense network / its size; needs no data", "--compression"
    )
    json: bool = setting(False, "print one JSON object", kind="switch")

    @property
    def everything(self) -> bool:
        return not (self.train_acc or self.test_acc or self.flops or self.compression)


@dataclass(frozen=True)
class EvaluationDataSettings(DataSettings):
    """The data, which ``data_path`` names too."""

    data_path: str | None = setting(
        None, "CIFAR10, CIFAR100, or the folder of the dataset", "--data_path", metavar="DIR"
    )
    download: bool = _truth("download CIFAR if it is not there", "--download")

    def resolved(self, recorded: str | None) -> "EvaluationDataSettings":
        """The same with ``data_path`` read as ``dataset`` and ``data``; ``recorded``: the data set
        of the checkpoint."""
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
