"""VGG has no channel selection: the mask implementation trains the same network."""

from .suite import suite


class vgg(suite.vgg):
    """The suite's VGG, with the same arguments. `slimming.slicing.sliced` turns it into
    its ``slim_form``."""

    slim_form = suite.vgg


defaultcfg = vgg.defaultcfg
