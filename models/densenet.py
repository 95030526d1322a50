"""DenseNet of basic blocks (Huang et al., CVPR 2017) with channel selection."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .basics import check_cfg, count_classes, initialize
from .channel_selection import channel_selection

STAGES = 3
DEFAULTS = {"dropRate": 0, "growthRate": 12, "compressionRate": 1}


class BasicBlock(nn.Module):
    """BN-select-ReLU-3x3 and dropout, concatenated to the input: adds ``growthRate`` channels.
    ``cfg``: the channels that the convolution reads; ``expansion`` has no effect."""

    def __init__(
        self,
        inplanes: int,
        cfg: int,
        expansion: int = 1,
        growthRate: int = 12,
        dropRate: float = 0,
        selection: Callable = channel_selection,
    ):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.select = selection(inplanes)
        self.conv1 = nn.Conv2d(cfg, growthRate, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.dropRate = dropRate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, self.grow(x)), 1)

    def grow(self, x: torch.Tensor) -> torch.Tensor:
        """The new channels only."""
        new = self.conv1(self.relu(self.select(self.bn1(x))))
        return F.dropout(new, self.dropRate, self.training) if self.dropRate else new


class Transition(nn.Module):
    """BN-select-ReLU-1x1 and 2x2 average pooling between two dense stages. ``cfg``: the channels
    that the convolution reads."""

    def __init__(
        self, inplanes: int, outplanes: int, cfg: int, selection: Callable = channel_selection
    ):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.select = selection(inplanes)
        self.conv1 = nn.Conv2d(cfg, outplanes, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(self.conv1(self.relu(self.select(self.bn1(x)))), 2)


class densenet(nn.Module):
    """DenseNet of depth 3n+4: (N, 3, 32, 32) images -> (N, num_classes) logits.

    Each block adds ``growthRate`` channels, with dropout probability ``dropRate``; a transition
    divides the channels by ``compressionRate``. ``cfg``: 3n+3 numbers, the kept channels of each
    BN in order: three times n blocks and a transition, with the last BN in place of the third
    transition; None is the full network. ``selection`` creates the layer after each BN. ValueError
    for an invalid depth, rate or cfg.

    >>> densenet(depth=40, num_classes=7)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 7])
    """

    BasicBlock, Transition = BasicBlock, Transition  # reachable from `models.densenet`
    cfg_per_norm = True  # cfg lists the kept channels of each BN
    dense1: nn.Sequential
    dense2: nn.Sequential
    dense3: nn.Sequential
    trans1: nn.Module
    trans2: nn.Module

    def __init__(
        self,
        depth: int = 40,
        dropRate: float = 0,
        dataset: str = "cifar10",
        growthRate: int = 12,
        compressionRate: float = 1,
        cfg: list | None = None,
        num_classes: int | None = None,
        selection: Callable = channel_selection,
    ):
        super().__init__()
        blocks, rest = divmod(depth - 4, STAGES)
        if rest or blocks < 1:
            raise ValueError(f"depth of densenet must be 3n+4 (40, 100, ...), not {depth}")
        if type(growthRate) is not int or growthRate < 1:
            raise ValueError(f"growthRate must be an integer of at least 1, not {growthRate}")
        if not 0 <= dropRate < 1 or not 1 <= compressionRate <= 2 * growthRate:
            raise ValueError(
                f"dropRate must be at least 0 and less than 1, and compressionRate from 1 to "
                f"{2 * growthRate}, not {dropRate} and {compressionRate}"
            )
        self.depth, self.growthRate, self.dropRate = depth, growthRate, dropRate
        self.compressionRate = compressionRate
        self.cfg = check_cfg(cfg, _full_cfg(blocks, growthRate, compressionRate))
        self.num_classes, self.selection = count_classes(dataset, num_classes), selection

        self.inplanes = 2 * growthRate
        self.conv1 = nn.Conv2d(3, self.inplanes, 3, padding=1, bias=False)
        for stage in range(STAGES):
            *widths, last = self.cfg[(blocks + 1) * stage : (blocks + 1) * (stage + 1)]
            dense = self._make_denseblock(BasicBlock, blocks, widths)
            self.add_module(f"dense{stage + 1}", dense)
            if stage < STAGES - 1:
                self.add_module(f"trans{stage + 1}", self._make_transition(compressionRate, last))
        self.bn = nn.BatchNorm2d(self.inplanes)
        self.select = selection(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(last, self.num_classes)
        initialize(self)

    @property
    def options(self) -> dict:
        """The rates that are not the default, as the constructor takes them."""
        ours = {name: getattr(self, name) for name in DEFAULTS}
        return {name: value for name, value in ours.items() if value != DEFAULTS[name]}

    def _make_denseblock(
        self, block: Callable[..., nn.Module], blocks: int, cfg: list[int]
    ) -> nn.Sequential:
        """``blocks`` blocks; ``cfg`` has the width of each."""
        if len(cfg) != blocks:
            raise ValueError(f"cfg has {len(cfg)} widths for {blocks} blocks")
        dense = nn.Sequential()
        for width in cfg:
            rates = {"growthRate": self.growthRate, "dropRate": self.dropRate}
            dense.append(block(self.inplanes, width, **rates, selection=self.selection))
            self.inplanes += self.growthRate
        return dense

    def _make_transition(self, compressionRate: float, cfg: int) -> nn.Module:
        """A transition that divides the current number of channels by ``compressionRate``."""
        inplanes, self.inplanes = self.inplanes, int(self.inplanes // compressionRate)
        return Transition(inplanes, self.inplanes, cfg, self.selection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense3(self.trans2(self.dense2(x)))
        return self.fc(self.relu(self.select(self.bn(x))).mean((2, 3)))


def _full_cfg(blocks: int, growth: int, compression: float) -> list[int]:
    widths, channels = [], 2 * growth
    for _ in range(STAGES):
        widths += [channels + growth * block for block in range(blocks + 1)]
        channels = int(widths[-1] // compression)
    return widths
