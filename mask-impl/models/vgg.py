"""VGG needs no channel selection: the mask implementation trains the very same network."""

from models.vgg import vgg

__all__ = ["vgg"]
