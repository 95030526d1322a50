"""Shared by all networks of this package: the number of classes, cfg, weight initialization."""

from torch import nn

CLASSES = {"cifar10": 10, "cifar100": 100}


def count_classes(dataset: str, num_classes: int | None) -> int:
    """``num_classes``, or the number of classes of the dataset. ValueError if that is unknown."""
    if num_classes is None and dataset not in CLASSES:
        raise ValueError(f"the number of classes of {dataset!r} is unknown: pass num_classes")
    return CLASSES[dataset] if num_classes is None else num_classes


def check_cfg(cfg: list | None, full: list) -> list:
    """``cfg`` as a list of the length of ``full``, or ``full`` where cfg is None.

    Raises ValueError if the lengths differ, a width is not a positive integer, or an 'M' (VGG's
    pooling) is at another position than in ``full``.
    """
    if cfg is None:
        return list(full)
    if len(cfg) != len(full):
        raise ValueError(f"cfg has {len(cfg)} entries, but this depth needs {len(full)}")
    for width, whole in zip(cfg, full, strict=True):
        number = isinstance(width, int) and not isinstance(width, bool) and width > 0
        if not number if whole != "M" else width != "M":
            raise ValueError(f"cfg has {width!r} where the full network has {whole!r}")
    return list(cfg)


def initialize(network: nn.Module) -> None:
    """γ = 0.5, β = 0, convolutions N(0, sqrt(2 / (k² · out))) (Network Slimming, section 4.3)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
            nn.init.zeros_(module.bias)
