"""VGG with BatchNorm after every convolution, for small images (Network Slimming, section 4.1)."""

import torch
from torch import nn

from .basics import check_cfg, count_classes, initialize

defaultcfg = {
    11: [64, "M", 128, "M", *[256] * 2, "M", *[512] * 2, "M", *[512] * 2],
    13: [*[64] * 2, "M", *[128] * 2, "M", *[256] * 2, "M", *[512] * 2, "M", *[512] * 2],
    16: [*[64] * 2, "M", *[128] * 2, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3],
    19: [*[64] * 2, "M", *[128] * 2, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4],
}


class vgg(nn.Module):
    """VGG-11, 13, 16 or 19: (N, 3, 32, 32) images -> (N, num_classes) logits.

    ``cfg`` lists the width of each convolution, and 'M' for 2x2 max pooling; None is the full
    network. A cfg whose length does not match ``depth`` determines the depth. Without
    ``init_weights`` the layers keep PyTorch's default initialization. ValueError for another depth
    or a cfg that does not fit it.

    >>> vgg(depth=11, num_classes=7)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 7])
    """

    defaultcfg = defaultcfg  # `models.vgg` is this class
    cfg_per_norm = True  # cfg lists the kept channels of each BN

    def __init__(
        self,
        dataset: str = "cifar10",
        depth: int = 19,
        init_weights: bool = True,
        cfg: list | None = None,
        num_classes: int | None = None,
    ):
        super().__init__()
        if cfg is not None and len(cfg) != len(defaultcfg.get(depth, ())):
            depth = _depth_of(cfg, depth)  # the original ignores depth if there is a cfg
        if depth not in defaultcfg:
            depths = ", ".join(map(str, defaultcfg))
            raise ValueError(f"depth of vgg must be one of {depths}, not {depth}")
        self.depth, self.cfg = depth, check_cfg(cfg, defaultcfg[depth])
        self.num_classes = count_classes(dataset, num_classes)
        self.feature = self.make_layers(self.cfg, batch_norm=True)
        self.classifier = nn.Linear(self.cfg[-1], self.num_classes)
        if init_weights:
            self._initialize_weights()

    def make_layers(self, cfg: list, batch_norm: bool = False) -> nn.Sequential:
        """Convolution, BN and ReLU for each width of ``cfg``, max pooling for each 'M'."""
        layers: list[nn.Module] = []
        channels = 3
        for width in cfg:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            channels = width
        return nn.Sequential(*layers)

    def _initialize_weights(self) -> None:
        initialize(self)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.feature(x).mean((2, 3)))  # 2x2 average pooling at 32x32


def _depth_of(cfg: list, depth: int) -> int:
    """The depth with max pooling at the same positions as ``cfg``, else ``depth``."""
    pools = [place for place, width in enumerate(cfg) if width == "M"]
    for known, full in defaultcfg.items():
        if len(full) == len(cfg) and pools == [i for i, width in enumerate(full) if width == "M"]:
            return known
    return depth
