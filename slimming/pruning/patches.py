"""The inputs and outputs of a convolution or linear layer as rows of a matrix product."""

import torch
import torch.nn.functional as F
from torch import nn

FEATURES = 6_144  # weights of an output, at most: a regression takes their square in memory


def obstacle(layer: nn.Conv2d | nn.Linear) -> str | None:
    """Why `sample` does not support this layer; None if it does."""
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            return f"its padding is {layer.padding_mode}, not zeros"
        if isinstance(layer.padding, str):
            return f"its padding is {layer.padding!r}, not a number"
    features = layer.weight[0].numel()
    if features > FEATURES:
        return f"each of its outputs has {features} weights, more than {FEATURES}"
    return None


def sample(
    layer: nn.Conv2d | nn.Linear,
    read: torch.Tensor,
    output: torch.Tensor,
    count: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of inputs (groups, n, F) and the outputs (n, O) that the layer computes from them; F
    has the order of the layer's ``weight``.

    ``read`` (N, C, H, W) and ``output`` (N, O, H', W') of a Conv2d are sampled at about ``count``
    random positions, or at all of them if there are no more; of a Linear all rows are used.
    """
    if isinstance(layer, nn.Linear):
        return rows(read)[None], rows(output)
    images, width = len(output), output.shape[3]
    size = output.shape[2] * width
    places = torch.arange(size).expand(images, size)
    if count < images * size:
        places = torch.randint(size, (images, -(-count // images)), generator=generator)
    places = places.to(read.device)  # once: every copy waits for the GPU
    return _patches(layer, read, places // width, places % width), _pixels(output, places)


def rows(value: torch.Tensor) -> torch.Tensor:
    """Maps (N, C, H, W) or features (N, ..., C) as rows (n, C)."""
    return (value.movedim(1, -1) if value.dim() == 4 else value).flatten(0, -2)


def _pixels(maps: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The pixels (N · P, C) of ``maps`` (N, C, H, W) at the flat positions ``places`` (N, P)."""
    images, _, height, width = maps.shape
    first = torch.arange(images, device=maps.device)[:, None] * (height * width)
    return rows(maps).index_select(0, (first + places).flatten())


def _patches(conv: nn.Conv2d, maps: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The patches of ``maps`` that ``conv`` reads for its outputs in rows ``y`` and columns ``x``
    (N, P)."""
    assert not isinstance(conv.padding, str)  # see `obstacle`
    (top, left), (down, right) = conv.padding, conv.stride
    padded = F.pad(maps, (left, left, top, top))
    taps = [
        _pixels(
            padded,
            (y * down + i * conv.dilation[0]) * padded.shape[3] + x * right + j * conv.dilation[1],
        )
        for i in range(conv.kernel_size[0])
        for j in range(conv.kernel_size[1])
    ]
    patches = torch.stack(taps, 2)  # (N · P, C, taps)
    return patches.view(len(patches), conv.groups, -1).transpose(0, 1)
