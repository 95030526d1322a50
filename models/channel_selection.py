"""The layer that lets a pruned network keep whole feature maps where a later sum or concatenation
needs them, and still read only the channels that survived."""

import torch
from torch import nn


def gather_channels(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """x[:, kept] of a (N, C, H, W) batch, in the memory layout of ``x``."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x.index_select(1, kept)
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, c)  # a view; its columns are quick to gather
    if torch.is_grad_enabled():
        own = rows.index_select(1, kept)
    else:  # quicker forward, but slower backward
        own = rows.gather(1, kept.expand(len(rows), -1))
    return own.view(n, h, w, -1).permute(0, 3, 1, 2)


class channel_selection(nn.Module):
    """Pass on the channels of a (N, C, H, W) batch whose ``indexes`` entry is not zero.

    It stands right after a BatchNorm2d. ``indexes`` (C floats, 0 or 1) is a Parameter without a
    gradient, so that it is in the state dict and moves with the module; change it with `keep`.
    While every entry is 1 the forward is the identity. Otherwise it gathers with an index tensor
    that stays on the device: the forward never waits for the device.

    >>> select = channel_selection(3)
    >>> select.keep(torch.tensor([True, False, True]))
    >>> select(torch.arange(3.0).view(1, 3, 1, 1)).flatten().tolist()
    [0.0, 2.0]
    """

    def __init__(self, num_channels: int):
        super().__init__()
        self.indexes = nn.Parameter(torch.ones(num_channels), requires_grad=False)
        self.register_buffer("kept", None, persistent=False)

    def keep(self, mask: torch.Tensor) -> None:
        """Select the channels where ``mask`` (C entries, bool or 0/1) is set."""
        with torch.no_grad():
            self.indexes.copy_(mask)
        self._refresh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.kept is None else gather_channels(x, self.kept)

    def train(self, mode: bool = True) -> "channel_selection":
        # Scripts that write to indexes.data directly switch to eval() or train() before they run.
        self._refresh()
        return super().train(mode)

    def _refresh(self) -> None:
        if self.indexes.is_meta:
            return
        kept = self.indexes.nonzero().flatten()
        if len(kept) == len(self.indexes):
            self.kept = None
        elif self.kept is None or not torch.equal(kept, self.kept):
            self.kept = kept

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()
