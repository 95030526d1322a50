"""Take channels out of a network, and prove that what is left computes the same.

- `groups`, `prunable`, `tried`, `some`, `declared`: the groups of channels that can go
- `prune`, `chosen`, `apply`: choose, slice and prove
- `sliced`, `masked`, `scatter`, `slice_tensors`, `kept_channels`: the slim and the masked network
- `cfg_of`, `load_slim_state`, `numbers_of`, `set_numbers`, `unsaved_buffers`: widths in files
- `kept_alive`, `without_dead_channels`: networks whose γ and β were set to zero
- `sample`, `where`: what a network takes, and where it is
"""

from slimming.channels.groups import declared
from slimming.slicing.proof import sample, where
from slimming.slicing.prune import (
    Slimmed,
    apply,
    chosen,
    exact,
    groups,
    kept_alive,
    prunable,
    prune,
    some,
    tried,
    without_dead_channels,
)
from slimming.slicing.slim import (
    Kept,
    cfg_of,
    cuts,
    kept_channels,
    load_slim_state,
    masked,
    numbers_of,
    of_one_group,
    scatter,
    set_numbers,
    slice_tensors,
    sliced,
    slim_to,
    unsaved_buffers,
)

__all__ = [
    "Kept",
    "Slimmed",
    "apply",
    "cfg_of",
    "chosen",
    "cuts",
    "declared",
    "exact",
    "groups",
    "kept_alive",
    "kept_channels",
    "load_slim_state",
    "masked",
    "numbers_of",
    "of_one_group",
    "prunable",
    "prune",
    "sample",
    "scatter",
    "set_numbers",
    "slice_tensors",
    "sliced",
    "slim_to",
    "some",
    "tried",
    "unsaved_buffers",
    "where",
    "without_dead_channels",
]
