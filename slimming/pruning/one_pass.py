"""Repair in closed form, from the moments of what the dense network's layers read.

One pass through the dense network serves any choice of channels: then a repair takes a fraction of
a second. Unlike `slimming.pruning.repair` it does not see errors grow from layer to layer.
"""

import torch
from torch import nn

from slimming.pruning.activations import Activations
from slimming.pruning.least_squares import Gram
from slimming.pruning.patches import obstacle, sample

BATCH = 128
POSITIONS = 16_384  # of a layer's output, over all images
STRENGTH = 1e-3  # of the ridge, relative to the mean square of the inputs


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
                x, _ = sample(layer, read, layer(read), count, generator)
                name = str(node.target)
                grams[name] = grams.get(name) or Gram(len(x), x.shape[2], x.device)
                grams[name].add_inputs(x)
        activations.compute(node)
    return grams
