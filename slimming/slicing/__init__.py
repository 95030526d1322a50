"""Take channels out of a network, and prove that what is left computes the same.

- `groups`, `declared`, `prunable`: the groups of channels that can go, tried
- `prune`, `apply`: choose, slice and prove
- `sliced`, `masked`, `scatter`, `slice_tensors`, `kept_channels`: the slim and the masked network
- `cfg_of`, `load_slim_state`: widths in files
- `living`, `without_dead_channels`: networks whose γ and β were set to zero
- `prove_equal`, `outputs`, `difference`: the proof
"""

from slimming.slicing.prune import Slimmed, apply, living, prune, without_dead_channels
from slimming.slicing.slim import (
    Kept,
    cfg_of,
    cuts,
    kept_channels,
    load_slim_state,
    masked,
    of_one_group,
    scatter,
    slice_tensors,
    sliced,
)
from slimming.slicing.trial import declared, exact, groups, prunable

__all__ = [
    "Kept",
    "Slimmed",
    "apply",
    "cfg_of",
    "cuts",
    "declared",
    "exact",
    "groups",
    "kept_channels",
    "living",
    "load_slim_state",
    "masked",
    "of_one_group",
    "prunable",
    "prune",
    "scatter",
    "slice_tensors",
    "sliced",
    "without_dead_channels",
]
