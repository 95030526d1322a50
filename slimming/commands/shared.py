"""What several commands share: masked networks as the slim ones that equal them."""

from dataclasses import replace

from torch import nn

from slimming.slicing.prune import without_dead_channels
from slimming.channels.groups import lists_widths
from slimming.channels.scaling import alive_channels
from slimming.data.loading import Data
from slimming.measuring.figures import measure
from slimming.reports.tables import before_after_text
from slimming.storage.architecture import Architecture
from slimming.training import loop


def against_full(
    model: nn.Module,
    network: Architecture,
    score: loop.Score,
    before: loop.Score,
    loader: Data,
) -> str:
    """Compare a fine-tuned slim network with the full one, which scored ``before`` at pruning.

    A masked network is measured as the equivalent slim one.
    """
    full = replace(network, cfg=None).build().to(loader.device)
    model = without_masked_channels(model, network.cfg).to(loader.device)
    images = loader.first(64)
    return before_after_text(*measure([full, model], images, (len(images),), [before, score]))


def without_masked_channels(model: nn.Module, cfg: list | dict | None) -> nn.Module:
    """The slim network that is equivalent to a masked one of mask-impl; any other, and one that a
    ``cfg`` made slim, unchanged."""
    alive = alive_channels(model)
    if cfg or not lists_widths(model) or all(m.all() for m in alive.values()):
        return model
    return without_dead_channels(model)
