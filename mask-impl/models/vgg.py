"""VGG needs no channel selection: the mask implementation trains the very same network."""

from .suite import suite


class vgg(suite.vgg):
    """The suite's VGG, with the same arguments. ``slim_form`` is what
    `slimming.pruning.slicing.sliced` makes of it."""

    slim_form = suite.vgg


defaultcfg = vgg.defaultcfg
