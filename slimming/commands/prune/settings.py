"""The flags of the pruning scripts."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from slimming.commands.pruning import (
    BudgetSettings,
    RepairSettings,
    allocation_field,
    least_field,
    round_to_field,
)
from slimming.commands.settings import NetworkSettings, filename_field, save_field
from slimming.data.datasets import DataSettings
from slimming.settings import fraction, part, setting


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
    round_to: int | Literal["auto"] = round_to_field(1)


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
