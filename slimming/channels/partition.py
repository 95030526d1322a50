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
