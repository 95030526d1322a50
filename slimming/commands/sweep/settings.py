"""The flags of sweep.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slimming.choosing.allocation import ALLOCATIONS
from slimming.choosing.threshold import LEAST
from slimming.commands.pruning import BudgetSettings, least_field
from slimming.commands.settings import CheckpointSettings, save_field
from slimming.commands.sweep.report import COSTS
from slimming.data.datasets import DataSettings
from slimming.errors import UserError
from slimming.repair.streaming import FEWEST
from slimming.settings import count, number, part, seed, setting, some_of

SEARCH = "search"
LOWEST, HIGHEST = 0.05, 0.95


@dataclass(frozen=True)
class PointsSettings:
    """Which slim networks are tried."""

    title: ClassVar[str] = "slim networks to try"
    points: int = setting(
        19,
        "number of percentages for each allocation, evenly spaced from 5 to 95",
        metavar="N",
        parse=number(int, 1, 1000),
    )
    allocation: tuple[str, ...] = setting(
        ("global", "uniform", "lamp"),
        "how the percentage is allocated to layers, separated by commas: global, one threshold on "
        "|γ|; uniform, all layers alike; lamp, by LAMP scores; search, random candidates (default: "
        "global,uniform,lamp)",
        metavar="A,...",
        parse=some_of((*ALLOCATIONS, SEARCH)),
    )
    candidates: int = setting(
        100, "number of random candidates of --allocation search", metavar="N", parse=count
    )
    least: float = least_field(LEAST)
    round_to: int = setting(
        1, "keep a multiple of N channels in each layer", metavar="N", parse=count
    )
    cost: str = setting(
        "flops", "cost that the front and its knee are found by", choices=tuple(COSTS)
    )

    def __post_init__(self) -> None:
        if SEARCH not in self.allocation and self.candidates != type(self).candidates:
            raise UserError("--candidates needs --allocation search: add it")

    @property
    def ratios(self) -> list[float]:
        """The fractions to prune."""
        if self.points == 1:
            return [(LOWEST + HIGHEST) / 2]
        step = (HIGHEST - LOWEST) / (self.points - 1)
        return [round(LOWEST + i * step, 6) for i in range(self.points)]


@dataclass(frozen=True)
class JudgingSettings:
    """How a slim network is judged."""

    title: ClassVar[str] = "accuracy"
    exact: bool = setting(
        False,
        "repair the networks on the front layer by layer, as --repair does, not in one pass only",
        kind="switch",
    )
    held_back: int = setting(
        1024,
        "number of training images to measure accuracy on, none of which repair uses",
        metavar="N",
        parse=number(int, 1, 10**6),
    )
    repair_images: int = setting(
        2048, "number of training images for repair", metavar="N", parse=number(int, FEWEST, 10**6)
    )
    repair_seed: int = setting(
        0, "random seed for choosing all these images", metavar="N", parse=seed
    )


@dataclass(frozen=True)
class SweepOutputSettings:
    """Where the results are written."""

    title: ClassVar[str] = "output"
    save: str | None = save_field("the folder of CHECKPOINT")


@dataclass(frozen=True)
class SweepRun:
    """All settings of sweep.py."""

    subject: CheckpointSettings = part(CheckpointSettings)
    points: PointsSettings = part(PointsSettings)
    budget: BudgetSettings = part(BudgetSettings)
    judging: JudgingSettings = part(JudgingSettings)
    data: DataSettings = part(DataSettings)
    output: SweepOutputSettings = part(SweepOutputSettings)

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.output.save or self.subject.path.parent)
