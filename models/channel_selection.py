"""The layer that lets a pruned network keep feature maps that a later sum or concatenation needs,
and still read only their kept channels."""

import torch
from torch import nn


def gather_channels(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """x[:, kept] of a (N, C, H, W) batch, in the memory layout of ``x``."""
    compiling = torch.compiler.is_compiling()  # a layout would be fixed, and with it the batch size
    if compiling or not x.is_contiguous(memory_format=torch.channels_last):
        return x.index_select(1, kept)
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, c)  # a view; gathering columns is fast
    if torch.is_grad_enabled():
        own = rows.index_select(1, kept)
    else:  # faster forward, but slower backward
        own = rows.gather(1, kept.expand(len(rows), -1))
    return own.view(n, h, w, -1).permute(0, 3, 1, 2)


class channel_selection(nn.Module):
    """Select the channels of a (N, C, H, W) batch whose ``indexes`` entry is not zero.

    Used directly after a BatchNorm2d. ``indexes`` (C floats, 0 or 1) is a Parameter without a
    gradient, so that it is in the state dict and moves with the module. Writes to it
    take effect in the next forward. If every entry is 1 the forward is
    the identity; otherwise it gathers with an index tensor that stays on the device.

    A forward detects writes without synchronising with the device: on the CPU it compares the
    values, elsewhere the version counter of the tensor, which misses writes through ``.data``:
    `keep`, ``train()`` and ``eval()`` compare the values on every device. torch.compile and
    torch.export capture the mask as a constant.

    >>> select = channel_selection(3)
    >>> select.indexes.data[1] = 0
    >>> select(torch.arange(3.0).view(1, 3, 1, 1)).flatten().tolist()
    [0.0, 2.0]
    """

    kept: torch.Tensor | None
    # state of ``indexes`` when ``kept`` was computed: values, tensor, version
    _read: tuple[torch.Tensor, torch.Tensor, int | None] | None = None

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
        if not torch.compiler.is_compiling():
            self._refresh()
        return x if self.kept is None else gather_channels(x, self.kept)

    def train(self, mode: bool = True) -> "channel_selection":
        self._read = None  # here a synchronisation with the device is acceptable
        self._refresh()
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_read": None}  # the version counter of a copy starts again

    def _refresh(self) -> None:
        """Bring ``kept`` up to date, if ``indexes`` has been written."""
        # not self.indexes, which torch.fx would trace; replicas of DataParallel have no parameters
        indexes = self._parameters.get("indexes", vars(self).get("indexes"))
        if indexes is None or indexes.is_meta or type(indexes) not in (nn.Parameter, torch.Tensor):
            return  # it has no values
        if self._read and _is_unchanged(indexes, *self._read):
            return
        with torch.inference_mode(False), torch.no_grad():  # training uses the index tensor too
            version = _version(indexes)
            values = indexes.detach().to("cpu", copy=True)
            kept = values.nonzero().flatten()
            old, self._read = self.kept, (values, indexes, version)
            if len(kept) == len(values):
                self.kept = None
            elif old is None or old.device != indexes.device or not torch.equal(old.cpu(), kept):
                self.kept = kept.to(indexes.device)


def _is_unchanged(
    indexes: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, version: int | None
) -> bool:
    if indexes.device.type == "cpu":  # 1 µs, and detects writes through NumPy
        return indexes.dtype == values.dtype and torch.equal(indexes, values)
    return indexes is tensor and version is not None and _version(indexes) == version


def _version(tensor: torch.Tensor) -> int | None:
    """The version counter of a tensor; None for inference tensors, which have none."""
    try:
        return tensor._version
    except RuntimeError:
        return None


ChannelSelection = channel_selection  # the name in the suite of preact_res20
