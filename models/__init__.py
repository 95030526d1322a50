"""The networks of the paper, by the names that ``--arch`` takes."""

from .channel_selection import channel_selection
from .densenet import densenet
from .preresnet import resnet
from .vgg import vgg
from .wiring import Wire

NETWORKS = {"vgg": vgg, "resnet": resnet, "densenet": densenet}
PAPER_DEPTH = {"vgg": 19, "resnet": 164, "densenet": 40}

__all__ = ["NETWORKS", "PAPER_DEPTH", "Wire", "channel_selection", "densenet", "resnet", "vgg"]
