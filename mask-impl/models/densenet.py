"""DenseNet without channel selection."""

from functools import partial

from torch import nn

from models.densenet import densenet as with_selection

densenet = partial(with_selection, selection=nn.Identity)
