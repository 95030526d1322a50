"""What one output of a convolution or linear layer is computed from, as rows of a matrix."""

import torch
import torch.nn.functional as F
from torch import nn


def positions(shape: torch.Size, count: int, generator: torch.Generator) -> torch.Tensor:
    """(N, P) flat positions in maps of ``shape`` (N, C, H, W), drawn by ``generator``: about
    ``count`` for all images together, or every position where there are no more."""
    images, size = shape[0], shape[2:].numel()
    each = -(-count // images)
    if each >= size:
        return torch.arange(size).expand(images, size)
    return torch.randint(size, (images, each), generator=generator)


def at(maps: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The pixels (N · P, C) of ``maps`` (N, C, H, W) at the flat positions ``places`` (N, P)."""
    images, _, height, width = maps.shape
    first = torch.arange(images)[:, None] * (height * width)
    rows = (first + places).flatten().to(maps.device)
    return maps.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, rows)


def read_by(conv: nn.Conv2d, maps: torch.Tensor, places: torch.Tensor, width: int) -> torch.Tensor:
    """The patches (groups, N · P, F) of ``maps`` (N, C, H, W) that ``conv``, padded with zeros,
    reads for the outputs at ``places`` (N, P) in maps of this ``width``; F in the order of its
    ``weight``."""
    assert not isinstance(conv.padding, str)  # repair leaves such layers as they are
    (top, left), (rows, columns) = conv.padding, conv.stride
    padded = F.pad(maps, (left, left, top, top))
    y, x = places // width * rows, places % width * columns
    taps = [
        at(padded, (y + i * conv.dilation[0]) * padded.shape[3] + x + j * conv.dilation[1])
        for i in range(conv.kernel_size[0])
        for j in range(conv.kernel_size[1])
    ]
    patches = torch.stack(taps, 2)  # (N · P, C, taps)
    return patches.view(len(patches), conv.groups, -1).transpose(0, 1)
