"""The flags of export.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slimming.commands.evaluate.settings import IN_FOLDER
from slimming.commands.settings import CheckpointSettings, save_field
from slimming.data.datasets import DataSettings
from slimming.deploy.formats import FORMATS, PRECISIONS
from slimming.deploy.forms import FORMS
from slimming.deploy.graph import Feed
from slimming.errors import UserError
from slimming.settings import count, number, part, seed, setting, some_of
from slimming.storage.preprocessing import Preprocessing

AUTO = "auto"
LAYOUTS = ("nchw", "nhwc")


@dataclass(frozen=True)
class ResultSettings(CheckpointSettings):
    """The checkpoint; in a folder, the result of the workflow."""

    in_folder: ClassVar[tuple[str, ...]] = IN_FOLDER


@dataclass(frozen=True)
class GraphSettings:
    """Which files are written, and what programs feed them."""

    title: ClassVar[str] = "files to write"
    format: tuple[str, ...] = setting(
        ("onnx",),
        "onnx; openvino; torch, a program of torch.export: one or several, separated by commas "
        "(default: onnx)",
        metavar="F,...",
        parse=some_of(tuple(FORMATS)),
    )
    precision: tuple[str, ...] = setting(
        ("fp32",),
        "fp32; bf16; fp16; int8, quantized after training: one or several, separated by commas "
        "(default: fp32)",
        metavar="P,...",
        parse=some_of(PRECISIONS),
    )
    form: str = setting(
        AUTO,
        "form of the graph: how channels that a selection drops are left out, and where BatchNorm "
        "is folded; auto keeps the fastest on this machine",
        choices=(AUTO, *FORMS),
    )
    uint8: bool = setting(
        False, "normalise inside the graph: programs feed raw pixels, 0 to 255", kind="switch"
    )
    layout: str = setting("nchw", "order of the dimensions of what programs feed", choices=LAYOUTS)
    batch: int = setting(
        64,
        "batch size at which forms compete and latency is measured",
        metavar="N",
        parse=number(int, 1, 2**16),
    )
    dynamic_batch: bool = setting(
        True,
        "accept any number of images; with --no-dynamic-batch exactly --batch",
        kind="on/off",
    )

    @property
    def targets(self) -> list[tuple[str, str]]:
        """The (format, precision) of each file."""
        return [(name, precision) for name in self.format for precision in self.precision]

    def feed(self, size: int, preprocessing: Preprocessing) -> Feed:
        """What programs feed, for images of ``size`` pixels."""
        batch = None if self.dynamic_batch else self.batch
        return Feed(size, self.uint8, self.layout == "nhwc", batch, preprocessing)


@dataclass(frozen=True)
class JudgingSettings:
    """How int8 is calibrated, and how lower precisions are judged."""

    title: ClassVar[str] = "lower precisions"
    max_drop: float = setting(
        0.5,
        "largest loss of top-1 against fp32, in points; a file that loses more is not written",
        metavar="POINTS",
        parse=number(float, 0, 100),
    )
    test_images: int | None = setting(
        None,
        "number of test images to judge on, equally many of each class (default: all)",
        metavar="N",
        parse=count,
    )
    calibration_images: int = setting(
        2048, "number of training images that calibrate int8", metavar="N", parse=count
    )
    calibration_seed: int = setting(
        0, "random seed for choosing these images", metavar="N", parse=seed
    )


@dataclass(frozen=True)
class ExportOutputSettings:
    """Where the files are written."""

    title: ClassVar[str] = "output"
    save: str | None = save_field("the folder of CHECKPOINT")


@dataclass(frozen=True)
class ExportRun:
    """All settings of export.py."""

    subject: ResultSettings = part(ResultSettings)
    graph: GraphSettings = part(GraphSettings)
    judging: JudgingSettings = part(JudgingSettings)
    data: DataSettings = part(DataSettings)
    output: ExportOutputSettings = part(ExportOutputSettings)

    def __post_init__(self) -> None:
        for name, precision in self.graph.targets:
            FORMATS[name].check(name, precision)

    @property
    def folder(self) -> Path:
        """Where the files are written. UserError if a file is in the way."""
        folder = Path(self.output.save or self.subject.path.parent)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--save {folder} is a file: use another folder")
        return folder
