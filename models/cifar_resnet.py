"""ResNet of basic blocks for small images (He et al., CVPR 2016, section 4.2)."""

import torch
from torch import nn

from slimming.channels.widths import resize

from .basics import count_classes

PLANES = (16, 32, 64)


class cifar_resnet(nn.Module):
    """ResNet of depth 6n+2: (N, 3, 32, 32) images -> (N, num_classes) logits.

    Shortcuts are projections (1x1 convolution and BN) where the shape changes. ``cfg``: the widths
    of layers by name (`models.resize`); None is the full network. ValueError for another depth or
    a cfg that does not fit it.

    >>> cifar_resnet(depth=8, num_classes=7)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 7])
    """

    def __init__(
        self,
        depth: int = 56,
        dataset: str = "cifar10",
        cfg: dict[str, list[int]] | None = None,
        num_classes: int | None = None,
    ):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(
                f"depth of cifar_resnet must be 6n+2 (20, 32, 56, 110, ...), not {depth}"
            )
        self.depth, self.num_classes = depth, count_classes(dataset, num_classes)

        self.conv1 = nn.Conv2d(3, PLANES[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(PLANES[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(PLANES[0], PLANES[0], blocks)
        self.layer2 = _stage(PLANES[0], PLANES[1], blocks)
        self.layer3 = _stage(PLANES[1], PLANES[2], blocks)
        self.fc = nn.Linear(PLANES[2], self.num_classes)
        if cfg is not None:
            resize(self, cfg)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _stage(inplanes: int, planes: int, blocks: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock, conv1x1  # imported late: takes a second

    stride, shortcut = 1, None
    if inplanes != planes:
        stride = 2
        shortcut = nn.Sequential(conv1x1(inplanes, planes, stride), nn.BatchNorm2d(planes))
    first = BasicBlock(inplanes, planes, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(blocks - 1)))


def initialize(network: nn.Module) -> None:
    """Initialize convolutions as in He et al., ICCV 2015: every filter has the same expected norm,
    so that layers are comparable by magnitude. BNs keep PyTorch's default: γ = 1, β = 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
