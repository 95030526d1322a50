"""--repair: recover accuracy without training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from slimming.channels.scaling import Masks
from slimming.data.batches import Batches
from slimming.data.stream import Stream
from slimming.errors import UserError
from slimming.pruning.repair import LEAST, Repaired, repair
from slimming.settings import number, seed, setting


@dataclass(frozen=True)
class RepairSettings:
    """Whether a pruned network is repaired, and on how many images."""

    title: ClassVar[str] = "repair"
    repair: bool = setting(
        False,
        "after pruning, fit the remaining weights to reproduce the activations of the dense "
        "network (least squares on training images, no labels, no gradient)",
        kind="switch",
        kept=True,
    )
    repair_images: int = setting(
        2048,
        "number of training images for --repair",
        metavar="N",
        parse=number(int, LEAST, 10**6),
        kept=True,
    )
    repair_seed: int = setting(
        0, "random seed for choosing these images", metavar="N", parse=seed, kept=True
    )

    def __post_init__(self) -> None:
        for name in ("repair_images", "repair_seed"):
            if not self.repair and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"--{name.replace('_', '-')} needs --repair: add it")

    def repaired(
        self, slim: nn.Module, dense: nn.Module, kept: Mapping[str, Masks], loader: Batches | Stream
    ) -> Repaired:
        """``slim`` repaired on images of the training ``loader``; prints how well that went."""
        images, _ = loader.draw(self.repair_images, self.repair_seed)
        repaired = repair(slim, dense, dict(kept), images, self.repair_seed)
        for note in repaired.notes:
            print(f"note: {note}")
        warning = "" if repaired.helped else "warning: "
        print(f"{warning}repair on {repaired.images} training images: {repaired}")
        return repaired
