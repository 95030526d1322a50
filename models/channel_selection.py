"""The layer that lets a pruned network keep whole feature maps where a later sum or concatenation
needs them, and still read only the channels that survived."""

from typing import Any

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


class Mask(nn.Parameter):
    """A parameter without a gradient whose version counter every write raises.

    PyTorch counts in-place writes to a tensor and its views; what ``data`` gives out and takes in
    it does not count. Here ``data`` is a view that counts.
    """

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.detach(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        counts = not self.is_inference()
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]  # a descriptor there
        if counts:
            torch.autograd.graph.increment_version(self)

    def detach(self) -> "Mask":  # of this class: ``nn.Parameter(mask)`` insists on it
        return torch.Tensor.detach(self).as_subclass(Mask)


REAL = (Mask, nn.Parameter, torch.Tensor)  # not what stands for a tensor while a graph is traced


class channel_selection(nn.Module):
    """Pass on the channels of a (N, C, H, W) batch whose ``indexes`` entry is not zero.

    It stands right after a BatchNorm2d. ``indexes`` (C floats, 0 or 1) is a Parameter without a
    gradient, so that it is in the state dict and moves with the module. Write it in any way that
    PyTorch has, or with `keep`: the next forward obeys. While every entry is 1 the forward is the
    identity, otherwise it gathers with an index tensor that stays on the device.

    A forward knows whether something was written since the last one without waiting for the device:
    on the CPU it compares the values, elsewhere the version counter (see `Mask`), which does not
    see what goes past PyTorch (DLPack) or through ``.data.data``. ``train()``, ``eval()``,
    ``load_state_dict()`` and `keep` compare the values on every device; torch.compile and
    torch.export take over the mask as it was then.

    >>> select = channel_selection(3)
    >>> select.indexes.data[1] = 0
    >>> select(torch.arange(3.0).view(1, 3, 1, 1)).flatten().tolist()
    [0.0, 2.0]
    """

    kept: torch.Tensor | None
    # of ``indexes``, when ``kept`` was made: the values, the tensor, its version
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
        self._read = None  # to wait for the device is allowed here
        self._refresh()
        return super().train(mode)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if type(param) is nn.Parameter:
            param.__class__ = Mask

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_read": None}  # a copy counts its versions anew

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.register_parameter("indexes", self.indexes)  # unpickled as a plain Parameter

    def _refresh(self) -> None:
        """Bring ``kept`` up to date, if ``indexes`` has been written."""
        # not self.indexes: torch.fx would trace it. A replica of DataParallel has no parameters
        indexes = self._parameters.get("indexes", vars(self).get("indexes"))
        if indexes is None or indexes.is_meta or type(indexes) not in REAL:
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

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}indexes"] = self.indexes.data  # a plain tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()


def _is_unchanged(
    indexes: torch.Tensor, values: torch.Tensor, tensor: torch.Tensor, version: int | None
) -> bool:
    if indexes.device.type == "cpu":  # 1 µs, and it sees what NumPy writes
        return indexes.dtype == values.dtype and torch.equal(indexes, values)
    return indexes is tensor and version is not None and _version(indexes) == version


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor has been written; None for those of inference mode, which do not count."""
    try:
        return tensor._version
    except RuntimeError:
        return None


ChannelSelection = channel_selection  # its name in the suite of preact_res20
