"""Which channels stay, whoever chose them."""

from dataclasses import dataclass

import torch

from slimming.pruning.scaling import Masks


@dataclass(frozen=True)
class Choice:
    """Which channels stay of each group, by its name: ``keep``, a part of ``alive``.

    ``ratio`` is the share (0 to 1) that was to be pruned, ``threshold`` the largest score (|γ|, or
    that of another measure) that goes. ``rescued`` names layers of groups that would have lost
    every channel and keep their best, ``spared`` counts the channels that stay for the sake of a
    multiple alone.
    """

    ratio: float
    threshold: float
    alive: Masks
    keep: Masks
    rescued: list[str]
    spared: int = 0

    @property
    def channels(self) -> tuple[int, int]:
        """How many channels are alive before and after."""
        return sum(int(a.sum()) for a in self.alive.values()), sum(
            int(k.sum()) for k in self.keep.values()
        )


def round_up(
    keep: torch.Tensor, factors: torch.Tensor, alive: torch.Tensor, multiple: int
) -> torch.Tensor:
    """``keep`` and the largest other ``factors`` that are alive, up to a multiple of channels."""
    missing = -int(keep.sum()) % multiple
    others = factors.masked_fill(keep | ~alive, -1)
    more = others.argsort(descending=True, stable=True)[:missing]
    rounded = keep.clone()
    rounded[more[others[more] >= 0]] = True
    return rounded
