"""Repair in closed form, from the moments of what the dense network's layers read.

One pass through the dense network serves any choice of channels: `repair` then takes a fraction of a
second. Unlike `slimming.pruning.repair` it does not see how errors grow from layer to layer.
"""

import copy

import torch
from torch import nn

from slimming.pruning import patches
from slimming.pruning.activations import Activations
from slimming.pruning.least_squares import Gram
from slimming.pruning.scaling import Masks
from slimming.pruning.widths import BATCH_NORMS

POSITIONS = 16_384  # of a layer's output, over all images
STRENGTH = 1e-3  # of the ridge, relative to the mean square of the inputs


@torch.no_grad()
def input_grams(
    model: nn.Module, images: torch.Tensor, features: int, seed: int = 0
) -> dict[str, Gram]:
    """The moments of what each layer reads, by its name: of the patches of a Conv2d, of the
    features of a Linear. Layers with more than ``features`` weights an output are left out."""
    generator = torch.Generator().manual_seed(seed)
    activations = Activations(model, list(images.split(128)))
    grams = {}
    for node in activations.order:
        layer = activations.module(node)
        activations.compute(node)
'''
