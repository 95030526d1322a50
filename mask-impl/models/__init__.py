"""The same networks without channel selection, by the names that ``--arch`` takes.

A program in mask-impl gets them with ``import models``. The folder mask-impl has no importable
name: from elsewhere ``importlib.import_module("mask-impl.models")`` reaches them once the
repository's root is on sys.path.
"""

from .densenet import densenet
from .preresnet import resnet
from .vgg import vgg

NETWORKS = {"vgg": vgg, "resnet": resnet, "densenet": densenet}

__all__ = ["NETWORKS", "densenet", "resnet", "vgg"]
