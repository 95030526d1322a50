"""Pre-activation ResNet without channel selection."""

from typing import Any

from .suite import no_selection, suite


class resnet(suite.resnet):
    """The suite's ResNet, with the same arguments except ``selection``.
    `slimming.slicing.sliced` turns it into its ``slim_form``, with channel selection."""

    slim_form = suite.resnet

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, selection=no_selection, **kwargs)


class Bottleneck(suite.preresnet.Bottleneck):
    """The suite's, without channel selection."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, selection=no_selection, **kwargs)
