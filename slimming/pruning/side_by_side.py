"""A slim network and the dense one that it was cut from, run on the same images."""

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn

from slimming.errors import UserError
from slimming.pruning.activations import Activations
from slimming.pruning.scaling import Masks
from slimming.pruning.widths import BATCH_NORMS, BatchNorm

SUMS = (operator.add, operator.iadd, torch.add)


class SideBySide:
    """Both networks' activations for ``batches`` of images (N, 3, H, W), one operation at a time.

    ``kept``: what stays of each layer of the ``dense`` network in the ``slim`` one (layer -> side
    -> one bool for each channel). UserError if the two do not run the same operations.
    """

    def __init__(
        self, slim: nn.Module, dense: nn.Module, kept: dict[str, Masks], batches: list[torch.Tensor]
    ):
        self.slim, self.dense = Activations(slim, batches), Activations(dense, batches)
        self.kept, self.batches = kept, range(len(batches))
        if [node.name for node in self.slim.order] != [node.name for node in self.dense.order]:
            raise UserError("the slim network is not the dense one without some channels")

    def steps(self) -> Iterator[tuple[fx.Node, nn.Module | None]]:
        """The slim network's operations in order, each with the layer that it calls, if it calls
        one; both networks run it when the next is asked for."""
        for node in self.slim.order:
            self.dense.compute(self._twin(node))
            yield node, self.slim.module(node)
            self.slim.compute(node)

    def lost(self, node: fx.Node) -> torch.Tensor | None:
        """Which inputs a layer of the dense network has lost, if any."""
        inputs = self.kept.get(str(node.target), {}).get("in")
        return None if inputs is None else ~inputs

    def read(self, node: fx.Node, batch: int) -> torch.Tensor:
        """What the slim network's layer reads."""
        return self.slim.value(node.all_input_nodes[0], batch)

    def read_dense(self, node: fx.Node, batch: int) -> torch.Tensor:
        """What the dense network's layer reads."""
        return self.dense.value(self._twin(node).all_input_nodes[0], batch)

    def wanted(self, node: fx.Node, batch: int, layer: str | None = None) -> torch.Tensor:
        """What the dense network puts out at ``node`` in the channels that are left after
        ``layer``, by default the one that ``node`` calls."""
        value = self.dense.value(self._twin(node), batch)
        out = self.kept.get(layer or str(node.target), {}).get("out")
        return value if out is None else value[:, out.to(value.device)]

    def target(self, node: fx.Node, batch: int, layer: str | None = None) -> torch.Tensor:
        """What the slim network should put out at ``node``: what is `wanted`.

        Where that is the end of a residual branch it is what the dense sum, not the dense branch,
        needs: the errors of the shortcut are made up for, and do not add up from block to block.
        """
        end = self._end_of_branch(node)
        if end is None:
            return self.wanted(node, batch, layer)
        norm, total, shortcut = end
        value = self.wanted(total, batch, str(node.target)) - self.slim.value(shortcut, batch)
        return value if norm is None else _before(norm, value)

    def _end_of_branch(self, node: fx.Node) -> tuple[BatchNorm | None, fx.Node, fx.Node] | None:
        """The BN behind a layer, if any, the sum that takes its output, and the sum's other
        operand; None if there is no such sum, or if that operand is not known yet."""
        norm, last, users = None, node, list(node.users)
        behind = self.slim.module(users[0]) if len(users) == 1 else None
        if isinstance(behind, BATCH_NORMS):
            norm, last = behind, users[0]
            users = list(last.users)
        if len(users) != 1 or users[0].target not in SUMS:
            return None
        others = [operand for operand in users[0].all_input_nodes if operand is not last]
        if len(others) != 1 or not self.slim.is_known(others[0]):
            return None
        return norm, users[0], others[0]

    def _twin(self, node: fx.Node) -> fx.Node:
        return self.dense.nodes[node.name]


def _before(norm: BatchNorm, value: torch.Tensor) -> torch.Tensor:
    """What a BN in eval mode turns into ``value``; its running mean where γ is 0."""
    assert norm.running_mean is not None and norm.running_var is not None  # eval mode needs both
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    inverse = torch.where(scale.abs() > torch.finfo(scale.dtype).eps, 1 / scale, 0)
    shape = (-1, 1, 1)
    centred = (value - norm.bias.view(shape)) * inverse.view(shape)
    return centred + norm.running_mean.view(shape)
