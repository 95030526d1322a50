"""DenseNet without channel selection."""

from typing import Any

from .suite import no_selection, suite


class densenet(suite.densenet):
    """The suite's DenseNet, with the same arguments except ``selection``.
    `slimming.slicing.sliced` turns it into its ``slim_form``, with channel selection."""

    slim_form = suite.densenet

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, selection=no_selection, **kwargs)


class BasicBlock(suite.densenet.BasicBlock):
    """The suite's, without channel selection."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, selection=no_selection, **kwargs)


class Transition(suite.densenet.Transition):
    """The suite's, without channel selection."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, selection=no_selection, **kwargs)
