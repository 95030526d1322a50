"""Repair in closed form, from the moments of the inputs of the dense network's layers.

The moments are computed once and serve any choice of channels: after that, a repair takes a
fraction of a second, plus one forward pass for the statistics of BNs. Unlike
`slimming.pruning.repair`, it does not compensate for the errors of earlier layers.
"""

import copy
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from slimming.channels.scaling import Masks, batch_norms
from slimming.channels.widths import layer_of
from slimming.pruning.activations import BATCH, LEAST, MEMORY, Activations, count_within
from slimming.pruning.least_squares import STRENGTH, Gram, solve
from slimming.pruning.patches import obstacle, sample
from slimming.pruning.statistics import mean_and_variance, move_statistics
from slimming.runtime.device import layout_for
from slimming.runtime.precision import full_fp32

POSITIONS = 16_384  # sampled positions of the output of a layer, over all images
FORWARD = 256  # images in the forward pass for the statistics of BNs


class OnePass:
    """The moments of a ``dense`` network's layers for ``images`` (N, 3, H, W) of the training data,
    normalised. They suffice to repair any slim network that is cut from it. Of images so large
    that their activations would take more than 3 GiB, only the first are used. UserError if
    torch.fx cannot trace the network."""

    def __init__(self, dense: nn.Module, images: torch.Tensor, seed: int = 0):
        self.dense = copy.deepcopy(dense).to(images.device).eval()
        count = count_within(MEMORY, images[:1], self.dense)
        self.grams = input_grams(self.dense, images[: max(LEAST, count)], seed)
        self.images = images[: max(LEAST, min(FORWARD, count // 4))]
        self.statistics = input_statistics(self.dense, self.images)

    def repaired(self, slim: nn.Module, kept: Mapping[str, Masks]) -> nn.Module:
        """A copy of ``slim``, the dense network without what is not in ``kept``, `refit` and
        `recalibrated`."""
        return self.recalibrated(refit(slim, self.dense, kept, self.grams), kept)

    def recalibrated(self, fitted: nn.Module, kept: Mapping[str, Masks]) -> nn.Module:
        """``fitted`` itself: the running statistics of each BN move as those of its input have
        moved between the dense network and this one."""
        fitted = fitted.to(self.images.device)
        norms = batch_norms(fitted)

        def move(name: str, mean: torch.Tensor, var: torch.Tensor) -> None:
            stays = kept.get(name, {}).get("out", slice(None))
            mean_before, var_before = (values[stays] for values in self.statistics[name])
            if norms[name].running_mean is not None:
                move_statistics(norms[name], mean - mean_before, var, var_before)

        input_statistics(fitted, self.images, move)
        return fitted


@full_fp32()
def input_statistics(
    model: nn.Module,
    images: torch.Tensor,
    before_norm: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance (C,) of what each BN of ``model`` reads for one batch of ``images``, by its
    name; ``before_norm(name, mean, var)`` is called before it runs."""
    layout = layout_for(model, images[:1])  # without the hooks below: it runs a copy, hooks and all
    found = {}

    def read(name: str, inputs: tuple[torch.Tensor]) -> None:
        found[name] = mean_and_variance(inputs)
        if before_norm:
            before_norm(name, *found[name])

    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs, name=name: read(name, inputs))
        for name, norm in batch_norms(model).items()
    ]
    try:
        with torch.no_grad():
            model(images.contiguous(memory_format=layout))
    finally:
        for hook in hooks:
            hook.remove()
    return found


@full_fp32()
@torch.no_grad()
def input_grams(model: nn.Module, images: torch.Tensor, seed: int = 0) -> dict[str, Gram]:
    """The moments of what each Conv2d and Linear reads for ``images`` (N, 3, H, W), by its name;
    layers that cannot be fitted are left out. UserError if torch.fx cannot trace ``model``."""
    generator = torch.Generator().manual_seed(seed)
    activations = Activations(model, list(images.split(BATCH)))
    grams: dict[str, Gram] = {}
    batches = range(len(activations.batches))
    for node in activations.order:
        layer = activations.module(node)
        if isinstance(layer, nn.Conv2d | nn.Linear) and not obstacle(layer):
            for b in batches:
                read = activations.value(node.all_input_nodes[0], b)
                count = POSITIONS // len(batches)
                one = layer(read[:1])  # for the shape: `compute` runs the layer
                output = one.expand(len(read), *one.shape[1:])
                x, _ = sample(layer, read, output, count, generator)
                name = str(node.target)
                grams[name] = grams.get(name) or Gram(len(x), x.shape[2], x.device)
                grams[name].add_inputs(x)
        activations.compute(node)
    return grams


@torch.no_grad()
def refit(
    slim: nn.Module, dense: nn.Module, kept: Mapping[str, Masks], grams: Mapping[str, Gram]
) -> nn.Module:
    """A copy of ``slim``, the ``dense`` network without what is not in ``kept``, whose layers
    reproduce the dense ones as well as they can from the inputs that are left, if those are as in
    the dense network; ``grams`` are `input_grams` of it. BN statistics stay as they are."""
    fitted = copy.deepcopy(slim).to(next(dense.parameters()).device)
    for layer, weight, gram, inputs in layers_to_fit(fitted, dense, kept, grams):
        stays = inputs.repeat_interleave(weight.shape[3])
        lost = weight.flatten(2)[:, :, ~stays]
        xx = gram.covariance()
        from_kept = xx[:, stays]
        missing = from_kept[:, :, ~stays] @ lost.mT
        slope = solve(from_kept[:, :, stays], gram.penalty(STRENGTH), missing)
        layer.weight += slope.mT.reshape(layer.weight.shape)
        if layer.bias is not None:
            mean = gram.x / gram.count
            layer.bias += (mean[:, :, ~stays] @ lost.mT - mean[:, :, stays] @ slope).flatten()
    return fitted


def layers_to_fit(
    fitted: nn.Module, dense: nn.Module, kept: Mapping[str, Masks], grams: Mapping[str, Gram]
) -> Iterator[tuple[nn.Conv2d | nn.Linear, torch.Tensor, Gram, torch.Tensor]]:
    """Each layer of the slim network ``fitted`` that lost inputs, the ``dense`` weights of the
    outputs that it keeps (groups, outputs, inputs, taps) in fp64, the moments of what it reads, and
    which inputs of a group stay."""
    for name, gram in grams.items():
        inputs = kept.get(name, {}).get("in")
        if inputs is None or inputs.all():
            continue
        full, groups = layer_of(dense, name).weight, len(gram.x)
        weight = full if "out" not in kept[name] else full[kept[name]["out"]]
        stays = inputs.view(groups, -1)[0].to(gram.xx.device)
        weight = weight.double().reshape(groups, -1, len(stays), full[0, 0].numel())
        layer = layer_of(fitted, name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)  # others have no moments
        yield layer, weight, gram, stays
