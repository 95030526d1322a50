"""MobileNet with depthwise separable convolutions (Howard et al., 1704.04861), for small images."""

import torch
from torch import nn

from slimming.channels.widths import resize

from .basics import count_classes
from .cifar_resnet import initialize

STEM = 32
BLOCKS = [  # output channels, stride: table 1 of the paper
    (64, 1),
    *[(128, 2), (128, 1)],
    *[(256, 2), (256, 1)],
    *[(512, 2), *[(512, 1)] * 5],
    *[(1024, 2), (1024, 1)],
]


class mobilenet(nn.Module):
    """MobileNet-V1 with a stem of stride 1: (N, 3, 32, 32) images -> (N, num_classes) logits.

    ``cfg``: the widths of layers by name (`models.resize`); None is the full network. ValueError
    for a cfg that does not fit.

    >>> mobilenet(num_classes=7)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 7])
    """

    def __init__(
        self,
        dataset: str = "cifar10",
        cfg: dict[str, list[int]] | None = None,
        num_classes: int | None = None,
    ):
        super().__init__()
        from torchvision.ops import Conv2dNormActivation  # imported late: takes a second

        self.num_classes = count_classes(dataset, num_classes)
        layers, channels = [Conv2dNormActivation(3, STEM, 3)], STEM
        for width, stride in BLOCKS:
            layers.append(Conv2dNormActivation(channels, channels, 3, stride, groups=channels))
            layers.append(Conv2dNormActivation(channels, width, 1))
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, self.num_classes)
        if cfg is not None:
            resize(self, cfg)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
