"""The same networks without channel selection, by the names that ``--arch`` takes.

This folder is no importable name: ``importlib.import_module("mask-impl.models")`` reaches it once
the repository's root is on sys.path.
"""

from .densenet import densenet
from .preresnet import resnet
from .vgg import vgg

NETWORKS = {"vgg": vgg, "resnet": resnet, "densenet": densenet}

__all__ = ["NETWORKS", "densenet", "resnet", "vgg"]
