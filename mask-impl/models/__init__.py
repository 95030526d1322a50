"""The same networks without channel selection, by their ``--arch`` names.

A program in mask-impl imports them with ``import models``. The name mask-impl cannot be imported
with a statement: elsewhere, use ``importlib.import_module("mask-impl.models")`` with the root of
the repository on sys.path.
"""

from .densenet import densenet
from .preresnet import resnet
from .vgg import vgg

NETWORKS = {"vgg": vgg, "resnet": resnet, "densenet": densenet}

__all__ = ["NETWORKS", "densenet", "resnet", "vgg"]
