"""Pre-activation ResNet of bottleneck blocks (He et al., ECCV 2016) with channel selection."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .basics import check_cfg, count_classes, initialize
from .channel_selection import channel_selection

PLANES = (16, 32, 64)


class Bottleneck(nn.Module):
    """BN-select-ReLU-1x1, BN-ReLU-3x3, BN-ReLU-1x1, added to the input.

    ``cfg``: the channels that the three convolutions read. The sum keeps all 4 · planes channels,
    so the first BN keeps its width, and ``select`` selects what the first convolution reads.
    ``downsample`` is the shortcut if stride or channels change.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        cfg: list,
        stride: int = 1,
        downsample: nn.Module | None = None,
        selection: Callable = channel_selection,
    ):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.select = selection(inplanes)
        self.conv1 = nn.Conv2d(cfg[0], cfg[1], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cfg[1])
        self.conv2 = nn.Conv2d(cfg[1], cfg[2], 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(cfg[2])
        self.conv3 = nn.Conv2d(cfg[2], planes * self.expansion, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample, self.stride = downsample, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(self.relu(self.select(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        out = self.conv3(F.relu(self.bn3(out), inplace=True))
        out += x if self.downsample is None else self.downsample(x)  # in place, to save memory
        return out


Block = Bottleneck  # its name in `resnet`, whose attribute `Bottleneck` hides the class


class resnet(nn.Module):
    """Pre-activation ResNet of depth 9n+2: (N, 3, 32, 32) images -> (N, num_classes) logits.

    ``cfg``: 9n+1 numbers, the kept channels of each BN in order, three per block and the last BN;
    None is the full network. ``selection`` creates the layer after each BN that keeps its width.
    ValueError for another depth or a cfg that does not fit it.

    >>> resnet(depth=20, num_classes=7)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 7])
    """

    Bottleneck = Bottleneck  # reachable from `models.resnet`
    cfg_per_norm = True  # cfg lists the kept channels of each BN
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        depth: int = 164,
        dataset: str = "cifar10",
        cfg: list | None = None,
        num_classes: int | None = None,
        selection: Callable = channel_selection,
    ):
        super().__init__()
        blocks, rest = divmod(depth - 2, 9)
        if rest or blocks < 1:
            raise ValueError(f"depth of resnet must be 9n+2 (20, 56, 110, 164, ...), not {depth}")
        self.depth, self.cfg = depth, check_cfg(cfg, _full_cfg(blocks))
        self.num_classes, self.selection = count_classes(dataset, num_classes), selection

        self.inplanes = PLANES[0]
        self.conv1 = nn.Conv2d(3, self.inplanes, 3, padding=1, bias=False)
        for stage, planes in enumerate(PLANES):
            widths = self.cfg[3 * blocks * stage : 3 * blocks * (stage + 1)]
            layer = self._make_layer(Bottleneck, planes, blocks, widths, stride=2 if stage else 1)
            self.add_module(f"layer{stage + 1}", layer)
        self.bn = nn.BatchNorm2d(self.inplanes)
        self.select = selection(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(self.cfg[-1], self.num_classes)
        initialize(self)

    def _make_layer(
        self, block: type[Block], planes: int, blocks: int, cfg: list, stride: int = 1
    ) -> nn.Sequential:
        """``blocks`` blocks, the first with ``stride``; ``cfg`` has three widths for each."""
        layer = nn.Sequential()
        for i in range(blocks):
            step, outplanes = stride if i == 0 else 1, planes * block.expansion
            shortcut = None
            if step != 1 or self.inplanes != outplanes:
                projection = nn.Conv2d(self.inplanes, outplanes, 1, step, bias=False)
                shortcut = nn.Sequential(projection)
            kept = cfg[3 * i : 3 * i + 3]
            layer.append(block(self.inplanes, planes, kept, step, shortcut, self.selection))
            self.inplanes = outplanes
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.relu(self.select(self.bn(x))).mean((2, 3)))


def _full_cfg(blocks: int) -> list[int]:
    widths, channels = [], PLANES[0]
    for planes in PLANES:
        for _ in range(blocks):
            widths += [channels, planes, planes]
            channels = planes * Bottleneck.expansion
    return [*widths, channels]
