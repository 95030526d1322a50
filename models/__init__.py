"""The networks of the paper and others, by their ``--arch`` names."""

import functools
from collections.abc import Callable

from torch import nn

from slimming.channels.widths import resize, widths

from . import zoo
from .channel_selection import ChannelSelection, channel_selection
from .cifar_resnet import cifar_resnet
from .densenet import densenet
from .mobilenet import mobilenet
from .preresnet import resnet
from .vgg import vgg

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "vgg": vgg,
    "resnet": resnet,
    "densenet": densenet,
    "mobilenet": mobilenet,
    "resnet-56": functools.partial(cifar_resnet, 56),
    "resnet-18": functools.partial(zoo.classifier, "resnet18"),
    "resnet-34": functools.partial(zoo.classifier, "resnet34"),
}
PAPER_DEPTH = {"vgg": 19, "resnet": 164, "densenet": 40}  # the networks that take a depth

__all__ = [
    "NETWORKS",
    "PAPER_DEPTH",
    "ChannelSelection",
    "channel_selection",
    "cifar_resnet",
    "constructor",
    "densenet",
    "mobilenet",
    "resize",
    "resnet",
    "vgg",
    "widths",
    "zoo",
]


def constructor(arch: str) -> Callable[..., nn.Module] | None:
    """The function that builds the network ``arch``, one of NETWORKS or of torchvision's
    classification models (`zoo.classifier`); None if there is none.

    >>> constructor("resnet50")(num_classes=7).num_classes
    7
    """
    if arch in NETWORKS:
        return NETWORKS[arch]
    return functools.partial(zoo.classifier, arch) if arch in zoo.names() else None
