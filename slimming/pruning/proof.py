"""Prove that a slim network computes the same outputs as the masked one."""

import copy

import torch
from torch import nn

from slimming.errors import UserError
from slimming.pruning.scaling import Masks
from slimming.pruning.widths import LAYERS
from slimming.runtime.failures import raise_if_of_the_machine

TOLERANCE = 1e-4


def only_logits(outputs: object) -> torch.Tensor:
    """``outputs`` of a network, if they are one tensor; UserError otherwise."""
    if not isinstance(outputs, torch.Tensor):
        raise UserError(
            f"the network returns a {type(outputs).__name__}, not a tensor of logits: wrap it in a "
            "module that returns only the logits"
        )
    return outputs


@torch.no_grad()
def prove_equal(small: nn.Module, reference: nn.Module, images: torch.Tensor) -> float:
    """The largest difference of two networks' logits on ``images`` (N, 3, H, W), relative to the
    largest logit, in fp32 on the CPU. UserError above 1e-4: the slim network would be wrong.
    """
    images = images.float().cpu()
    copies = [copy.deepcopy(model).cpu().float().eval() for model in (small, reference)]
    ours, theirs = (only_logits(model(images)) for model in copies)
    scale = theirs.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float((ours - theirs).abs().max() / scale)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the slim network differs from the masked one by {difference:.1e} of the "
            f"largest logit (allowed: {TOLERANCE:.0e}): nothing is written. This is a bug, please "
            "report it with the checkpoint"
        )
    return difference


@torch.no_grad()
def first_difference(
    small: nn.Module, reference: nn.Module, kept: dict[str, Masks], images: torch.Tensor
) -> str | None:
    """The name of the first layer, in the order of the forward pass, whose kept channels differ.

    In fp64, relative to the largest output of the layer, and on noise: with constant images, many
    operations that mix channels have no effect.
    """
    noise = torch.randn(2, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    seen = [_outputs(model, noise) for model in (small, reference)]
    for (name, ours), (_, theirs) in zip(*seen, strict=False):
        if "out" in kept.get(name, {}):
            dim = -1 if isinstance(small.get_submodule(name), nn.Linear) else 1
            theirs = theirs.index_select(dim, kept[name]["out"].nonzero().flatten())
        elif "mask" in kept.get(name, {}):  # the others are zero, and nothing reads them
            stay = kept[name]["mask"].nonzero().flatten()
            ours, theirs = ours.index_select(1, stay), theirs.index_select(1, stay)
        if ours.shape != theirs.shape:
            continue  # a layer without channels, or after one that differs
        if not (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max():
            return name
    return None


def _outputs(model: nn.Module, images: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The (name, output) of each layer of a copy of ``model``, up to the first exception if any."""
    copied, outputs = copy.deepcopy(model).double(), []
    for name, layer in copied.named_modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_hook(
                lambda _, __, out, name=name: outputs.append((name, out.clone()))
            )
    try:
        copied(images.double())
    except Exception as error:  # of the user's forward: the outputs before it are compared
        raise_if_of_the_machine(error)
    return outputs
