"""A slim network and the dense network that it was cut from, run in parallel on the same images."""

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn

from slimming.channels.scaling import Masks
from slimming.channels.widths import BATCH_NORMS, BatchNorm
from slimming.errors import UserError
from slimming.pruning.activations import Activations

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
        self.twins: dict[fx.Node, fx.Node] = {}
        for node in self.slim.order:
            twin = self.dense.nodes.get(node.name)
            if twin is None and hasattr(self.slim.module(node), "indexes"):
                # a channel selection that the dense network does without
                twin = self.twins[node.all_input_nodes[0]]
            if twin is not None:
                self.twins[node] = twin
        if list(dict.fromkeys(self.twins.values())) != self.dense.order or len(self.twins) != len(
            self.slim.order
        ):
            raise UserError("the slim network is not the dense one without some channels")

    def steps(self) -> Iterator[tuple[fx.Node, nn.Module | None]]:
        """The slim network's operations in order, each with the layer that it calls, if any. Both
        networks have run all operations before the yielded one."""
        for node in self.slim.order:
            self.dense.compute(self._twin(node))
            yield node, self.slim.module(node)
            self.slim.compute(node)

    def lost(self, node: fx.Node) -> torch.Tensor | None:
        """The mask of the inputs that a layer has lost; None if it keeps all."""
        inputs = self.kept.get(str(node.target), {}).get("in")
        return None if inputs is None else ~inputs

    def read(self, node: fx.Node, batch: int) -> torch.Tensor:
        """The input of the layer in the slim network."""
        return self.slim.value(node.all_input_nodes[0], batch)

    def read_dense(self, node: fx.Node, batch: int) -> torch.Tensor:
        """The input of the layer in the dense network."""
        return self.dense.value(self._twin(node).all_input_nodes[0], batch)

    def wanted(self, node: fx.Node, batch: int, layer: str | None = None) -> torch.Tensor:
        """The output of the dense network at ``node``, in the channels that ``layer`` keeps, by
        default the layer that ``node`` calls."""
        return self._kept(self.dense.value(self._twin(node), batch), layer or str(node.target))

    def target(self, node: fx.Node, batch: int, layer: str | None = None) -> torch.Tensor:
        """The target of the slim network's output at ``node``: that of the dense network, `wanted`.

        At the end of a residual branch, it is the dense sum minus the slim shortcut, so that the
        branch compensates for errors of the shortcut, and errors do not add up over blocks.
        """
        end = self._end_of_branch(node)
        if end is None:
            return self.wanted(node, batch, layer)
        norm, total, shortcut = end
        branch, both = (self.dense.value(self._twin(n), batch) for n in (node, total))
        if branch.shape != both.shape:  # the sum broadcasts the branch
            return self.wanted(node, batch, layer)
        value = self._kept(both, str(node.target)) - self.slim.value(shortcut, batch)
        return value if norm is None else _before(norm, value)

    def _end_of_branch(self, node: fx.Node) -> tuple[BatchNorm | None, fx.Node, fx.Node] | None:
        """The BN behind a layer, if any, the sum that takes its output, and the sum's other
        operand; None if there is no such sum, or if that operand is not known yet."""
        norm, last, users = None, node, list(node.users)
        behind = self.slim.module(users[0]) if len(users) == 1 else None
        if isinstance(behind, BATCH_NORMS):
            if behind.running_mean is None:  # it normalises by the statistics of each batch
                return None
            norm, last = behind, users[0]
            users = list(last.users)
        if len(users) != 1 or users[0].target not in SUMS or users[0].kwargs:
            return None  # with alpha= the sum is weighted
        others = [operand for operand in users[0].all_input_nodes if operand is not last]
        if len(others) != 1 or not self.slim.is_known(others[0]):
            return None
        return norm, users[0], others[0]

    def _kept(self, value: torch.Tensor, layer: str) -> torch.Tensor:
        """The channels of ``value`` (N, C, ...) that are left after a layer."""
        out = self.kept.get(layer, {}).get("out")
        return value if out is None else value[:, out.to(value.device)]

    def _twin(self, node: fx.Node) -> fx.Node:
        return self.twins[node]


def _before(norm: BatchNorm, value: torch.Tensor) -> torch.Tensor:
    """The input for which a BN in eval mode returns ``value``; its running mean where γ is 0."""
    assert norm.running_mean is not None and norm.running_var is not None  # see _end_of_branch
    deviation, shape = (norm.running_var + norm.eps).sqrt(), (-1, 1, 1)
    scale = norm.weight / deviation if norm.affine else 1 / deviation
    inverse = torch.where(scale.abs() > torch.finfo(scale.dtype).eps, 1 / scale, 0)
    centred = value - norm.bias.view(shape) if norm.affine else value
    return centred * inverse.view(shape) + norm.running_mean.view(shape)
