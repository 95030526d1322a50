"""Which labels belong to one unit of channels: connected components."""

import torch


def components(count: int, pairs: torch.Tensor) -> torch.Tensor:
    """The smallest label of the component of each of the labels 0 … ``count`` - 1, when the two
    labels of each of ``pairs`` (n, 2) belong together.

    >>> components(5, torch.tensor([[1, 3], [3, 4]])).tolist()
    [0, 1, 2, 1, 1]
    """
    roots = torch.arange(count)
    while len(pairs):
        low = roots[pairs].amin(1, keepdim=True).expand_as(pairs)
        merged = roots.scatter_reduce(0, roots[pairs].flatten(), low.flatten(), "amin")
        while not torch.equal(merged, shorter := merged[merged]):
            merged = shorter
        if torch.equal(merged, roots):
            break
        roots = merged
    return roots


def pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The pairs (n, 2) of the elements of two tensors at equal places, each once.

    >>> pairs(torch.tensor([1, 1, 2]), torch.tensor([3, 3, 4])).tolist()
    [[1, 3], [2, 4]]
    """
    keys = ((a.long() << 32) | b.long()).flatten().unique()  # 20x as fast as unique(dim=0)
    return torch.stack([keys >> 32, keys & 0xFFFFFFFF], 1)
