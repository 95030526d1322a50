"""Forms of one graph: which channels a layer reads by a gather, and which by zero weights; where
BatchNorm is folded; where it is a clamp.

All forms compute the same outputs. Which one is fastest depends on the engine that runs it.
"""

from dataclasses import dataclass

import torch
from torch import nn

TINY = 1e-30  # smaller scales count as 0: a division by them overflows
GATHERING = 36  # multiplications that take as long as copying one value, PyTorch on a CPU


@dataclass(frozen=True)
class Form:
    """How the graph of a network is written.

    ``fold``: a BN after a convolution is folded into it. ``selection``: channels that a selection
    drops are left out by a "gather", or read by "zeros" in the weights of the next layer, or
    whatever of these is cheaper for each layer ("mixed"). ``clamp``: a BN before a ReLU becomes a
    clamp if the next layer can absorb its scale and shift. The latter two require ``fold``.
    """

    fold: bool = True
    selection: str = "mixed"
    clamp: bool = True

    def gathers(self, dropped: int, kept: int, work: int) -> bool:
        """Whether a gather leaves out the ``dropped`` channels; ``work``: multiplications that the
        next layers spend on a channel of a pixel."""
        mixed = dropped * work >= GATHERING * kept
        return {"gather": True, "zeros": False, "mixed": mixed}[self.selection]


FORMS = {
    "plain": Form(False, "gather", False),
    "folded": Form(True, "mixed", False),
    "gather": Form(True, "gather", False),
    "gather-clamp": Form(True, "gather", True),
    "zeros": Form(True, "zeros", False),
    "zeros-clamp": Form(True, "zeros", True),
    "clamp": Form(True, "mixed", True),
}
DEPLOYED = FORMS["clamp"]  # the fastest in PyTorch, on a CPU


class _Selected(nn.Module):
    """Replaces a BN that keeps its width and the channel selection after it.

    (N, C, H, W) -> (N, kept, H, W). ``kept``: indices, or None for all C.
    """

    kept: torch.Tensor | None

    def __init__(self, keep: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", None if keep.all() else keep.nonzero().flatten())

    def gathered(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The kept channels of ``x``, and a tensor that results may overwrite, if any."""
        if self.kept is None:
            return x, None
        pixels = x.permute(0, 2, 3, 1)
        if torch.compiler.is_compiling() or not pixels.is_contiguous():
            return x.index_select(1, self.kept), None
        rows = pixels.flatten(0, 2)  # a view; gathering columns takes 0.93 instead of 1.68 ms
        copied = rows.gather(1, self.kept.expand(len(rows), -1)).view(*pixels.shape[:3], -1)
        return (x := copied.permute(0, 3, 1, 2)), x


class SelectedAffine(_Selected):
    """Gather channels, then scale and shift them: scale · x[:, kept] + shift, before a ReLU."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor, keep: torch.Tensor) -> None:
        super().__init__(keep)
        self.register_buffer("scale", scale[keep].view(-1, 1, 1))
        self.register_buffer("shift", shift[keep].view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, out = self.gathered(x)
        return torch.addcmul(self.shift, x, self.scale, out=out)


class SelectedClamp(_Selected):
    """BN and ReLU as one pass over the kept channels, if the next layer is linear per pixel.

    ReLU(scale · x + shift) = scale · clamp(x) + shift, with the clamp at x = -shift / scale, from
    below where scale is positive and from above where it is negative. Scale and shift of the
    clamped x are folded into the next layer. A scale of 0 leaves a constant, which is folded too.
    """

    low: torch.Tensor
    high: torch.Tensor | None

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor, keep: torch.Tensor) -> None:
        super().__init__(keep)
        bend = (-shift / scale)[keep].view(-1, 1, 1)
        positive, negative = (side[keep].view(-1, 1, 1) for side in (scale > TINY, scale < -TINY))
        infinite = torch.full_like(bend, torch.inf)
        self.register_buffer("low", torch.where(positive, bend, -infinite))
        self.register_buffer(
            "high", torch.where(negative, bend, infinite) if negative.any() else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, out = self.gathered(x)
        return torch.clamp(x, self.low, self.high, out=out)
