"""Whether a slim network still tells images apart.

The proof cannot show it: if what is left of a network is constant, so is the masked network, and
both are equal.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from slimming.channels import inputs as arguments
from slimming.channels.inputs import Inputs
from slimming.channels.scaling import Masks
from slimming.pruning.slicing.proof import outputs

FAINT = 0.01  # of the dense network's spread: less is hardly any, see benchmarks/defaults.py
NOISE = 1e-6  # of the largest output: a smaller spread is rounding


def spread_ratio(slim: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> float | None:
    """The spread over images of a slim network's outputs, as a fraction of the dense network's.

    Both are lists of the same output tensors (N, ...), for the same N images. The spread of one is
    the root mean square, over its elements, of the standard deviation over images; of several
    outputs the smallest fraction counts. None if it cannot be told: fewer than 2 images, or dense
    outputs that are constant themselves.
    """
    ratios = []
    for ours, theirs in zip(slim, dense, strict=True):
        if theirs.dim() == 0 or len(theirs) < 2 or not theirs.is_floating_point():
            continue
        before = _spread(theirs)
        if before > NOISE * float(theirs.abs().max()):
            ratios.append(_spread(ours) / before)
    return min(ratios, default=None)


def liveness(slim: nn.Module, dense: nn.Module, inputs: Inputs) -> float | None:
    """The `spread_ratio` of what both networks return for ``inputs``, in fp32 in eval mode on the
    device of the inputs. Of a tree of outputs, those tensors count that have one row a sample."""
    samples, device = arguments.count(inputs), arguments.tensors(inputs)[0].device
    ours, theirs = (outputs(model, inputs, device=device) for model in (slim, dense))
    pairs = [
        (a, b)
        for a, b in zip(ours, theirs, strict=False)
        if a.shape == b.shape and b.dim() and len(b) == samples
    ]
    return spread_ratio([a for a, _ in pairs], [b for _, b in pairs])


def liveness_warning(ratio: float | None, kept: Mapping[str, Masks]) -> str | None:
    """What to tell the user if the outputs hardly depend on the image any more, with the narrowest
    of the layers that ``kept`` (layer -> side -> one bool for each channel) holds."""
    if ratio is None or ratio >= FAINT:
        return None
    text = (
        "the outputs of the slim network hardly depend on the image: their spread is "
        f"{ratio:.1e} of that of the dense network"
    )
    masks = {
        name: mask
        for name, sides in kept.items()
        for side, mask in sides.items()
        if side != "in"  # of the layers that write channels or select them
    }
    if not masks:
        return text
    name = min(masks, key=lambda name: float(masks[name].float().mean()))
    left, total = int(masks[name].sum()), len(masks[name])
    return f"{text}; the narrowest layer, {name}, keeps {left} of {total} channels: prune less"


def _spread(values: torch.Tensor) -> float:
    return float(values.double().std(0, correction=0).square().mean().sqrt())
