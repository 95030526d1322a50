"""DenseNet of basic blocks (Huang et al., CVPR 2017) with channel selection, no compression."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .channel_selection import channel_selection
from .wiring import Wire, check_cfg, count_classes, initialize

GROWTH = 12
STAGES = 3


class BasicBlock(nn.Module):
    """BN-select-ReLU-3x3, concatenated to the input: ``growth`` more channels come out."""

    def __init__(self, inplanes: int, width: int, selection: Callable):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.select = selection(inplanes)
        self.conv1 = nn.Conv2d(width, GROWTH, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, self.grow(x)), 1)

    def grow(self, x: torch.Tensor) -> torch.Tensor:
        """The new channels alone."""
        return self.conv1(self.relu(self.select(self.bn1(x))))


class Transition(nn.Module):
    """BN-select-ReLU-1x1 and 2x2 average pooling between two dense stages."""

    def __init__(self, inplanes: int, width: int, selection: Callable):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.select = selection(inplanes)
        self.conv1 = nn.Conv2d(width, inplanes, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(self.conv1(self.relu(self.select(self.bn1(x)))), 2)


class densenet(nn.Module):
    """DenseNet of depth 3n+4, growth 12: (N, 3, 32, 32) images -> (N, num_classes) logits.

    ``cfg``: 3n+3 numbers, the kept channels of each BN in order: n blocks and a transition, thrice,
    the last BN in place of the third transition; None is the full network. ``selection`` makes the
    layer after each BN. ValueError for another depth or a cfg that does not fit it.

    >>> densenet(depth=40, num_classes=7)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 7])
    """

    def __init__(
        self,
        depth: int = 40,
        dataset: str = "cifar10",
        cfg: list | None = None,
        num_classes: int | None = None,
        selection: Callable = channel_selection,
    ):
        super().__init__()
        blocks, rest = divmod(depth - 4, STAGES)
        if rest or blocks < 1:
            raise ValueError(f"densenet has depth 3n+4 (40, 100, ...), not {depth}")
        self.depth, self.cfg = depth, check_cfg(cfg, _full_cfg(blocks))
        self.num_classes = count_classes(dataset, num_classes)

        widths, channels = iter(self.cfg), 2 * GROWTH
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for stage in range(1, STAGES + 1):
            dense = nn.Sequential()
            for _ in range(blocks):
                dense.append(BasicBlock(channels, next(widths), selection))
                channels += GROWTH
            self.add_module(f"dense{stage}", dense)
            if stage < STAGES:
                self.add_module(f"trans{stage}", Transition(channels, next(widths), selection))
        self.bn = nn.BatchNorm2d(channels)
        self.select = selection(channels)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(next(widths), self.num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense3(self.trans2(self.dense2(x)))
        return self.fc(self.relu(self.select(self.bn(x))).mean((2, 3)))

    def wiring(self) -> list[Wire]:
        """Each convolution but the first reads the BN before it; all its outputs stay."""
        readers = [n for n, m in self.named_modules() if isinstance(m, BasicBlock | Transition)]
        wires = [Wire(f"{name}.conv1", f"{name}.bn1", None) for name in readers]
        return [*wires, Wire("fc", "bn", None)]


def _full_cfg(blocks: int) -> list[int]:
    widths, channels = [], 2 * GROWTH
    for _ in range(STAGES):
        widths += [channels + GROWTH * block for block in range(blocks + 1)]
        channels = widths[-1]
    return widths
