"""Repair in closed form, from the moments of what the dense network's layers read.

One pass through the dense network serves any choice of channels: then a repair takes a fraction of
a second. Unlike `slimming.pruning.repair` it does not see errors grow from layer to layer.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from slimming.pruning.activations import Activations
from slimming.pruning.least_squares import STRENGTH, Gram, solve
from slimming.pruning.patches import obstacle, sample
from slimming.pruning.scaling import Masks
from slimming.pruning.widths import layer_of

BATCH = 128
POSITIONS = 16_384  # of a layer's output, over all images


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
    fitted = copy.deepcopy(slim)
    for name, gram in grams.items():
        inputs = kept.get(name, {}).get("in")
        if inputs is None or inputs.all():
            continue
        layer, full = layer_of(fitted, name), layer_of(dense, name)
        groups, taps = len(gram.x), full.weight[0, 0].numel()
        stays = inputs.view(groups, -1)[0].repeat_interleave(taps).to(gram.xx.device)
        weight = full.weight if "out" not in kept[name] else full.weight[kept[name]["out"]]
        lost = weight.double().unflatten(0, (groups, -1)).flatten(2)[:, :, ~stays]
        xx = gram.covariance()
        from_kept = xx[:, stays]
        missing = from_kept[:, :, ~stays] @ lost.mT
        slope = solve(from_kept[:, :, stays], gram.penalty(STRENGTH), missing)
        layer.weight += slope.mT.reshape(layer.weight.shape)
        if layer.bias is not None:
            mean = gram.x / gram.count
            layer.bias += (mean[:, :, ~stays] @ lost.mT - mean[:, :, stays] @ slope).flatten()
    return fitted
