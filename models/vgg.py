"""VGG with BatchNorm after every convolution, for small images (Network Slimming, section 4.1)."""

import torch
from torch import nn

from .wiring import Wire, check_cfg, count_classes, initialize

WIDTHS = {
    11: [64, "M", 128, "M", *[256] * 2, "M", *[512] * 2, "M", *[512] * 2],
    13: [*[64] * 2, "M", *[128] * 2, "M", *[256] * 2, "M", *[512] * 2, "M", *[512] * 2],
    16: [*[64] * 2, "M", *[128] * 2, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3],
    19: [*[64] * 2, "M", *[128] * 2, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4],
}


class vgg(nn.Module):
    """VGG-11, 13, 16 or 19: (N, 3, 32, 32) images -> (N, num_classes) logits.

    ``cfg`` lists the width of each convolution, 'M' for 2x2 max pooling; None is the full network.
    ValueError for another depth or a cfg that does not fit it.

    >>> vgg(depth=11, num_classes=7)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 7])
    """

    def __init__(
        self,
        depth: int = 19,
        dataset: str = "cifar10",
        cfg: list | None = None,
        num_classes: int | None = None,
    ):
        super().__init__()
        if depth not in WIDTHS:
            raise ValueError(f"vgg has depth {', '.join(map(str, WIDTHS))}, not {depth}")
        self.depth, self.cfg = depth, check_cfg(cfg, WIDTHS[depth])
        self.num_classes = count_classes(dataset, num_classes)
        self.feature = _features(self.cfg)
        self.classifier = nn.Linear(self.cfg[-1], self.num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.feature(x).mean((2, 3)))  # 2x2 average pooling at 32x32

    def wiring(self) -> list[Wire]:
        """Each convolution reads the BN before it and writes the BN after it."""
        bns = [n for n, m in self.named_modules() if isinstance(m, nn.BatchNorm2d)]
        convs = [n for n, m in self.named_modules() if isinstance(m, nn.Conv2d)]
        reads = [None, *bns]
        wires = [Wire(*names) for names in zip(convs, reads[:-1], bns, strict=True)]
        return [*wires, Wire("classifier", bns[-1], None)]


def _features(cfg: list) -> nn.Sequential:
    layers, channels = [], 3
    for width in cfg:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers)
