"""Prove that a slim network computes the same outputs as the masked one."""

import math
from typing import NamedTuple

import torch
from torch import nn

from slimming.channels import inputs as arguments
from slimming.channels.groups import copied
from slimming.channels.inputs import Inputs
from slimming.errors import UserError, raise_if_of_the_machine

TOLERANCE = 1e-4


def outputs(
    model: nn.Module, inputs: Inputs, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """The tensors that a copy of ``model`` returns, in eval mode on its device, computed in
    ``dtype``. A network that draws random numbers draws the same each time."""
    network = copied(model).eval().to(dtype)
    device = where(network)[0]
    own = arguments.like(inputs, device, dtype)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return arguments.tensors(arguments.call(network, own))


def where(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of a network, those of its first parameter of floats."""
    found = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    first = next(found, torch.zeros(()))
    return first.device, first.dtype


def sample(model: nn.Module, inputs: Inputs) -> Inputs:
    """The first sample of ``inputs``, or all of them if the network does not take one alone."""
    one = arguments.first(inputs, 1)
    try:
        outputs(model, one)
    except Exception as error:  # the user's forward may expect a batch of one size
        raise_if_of_the_machine(error)
        return inputs
    return one


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference of two lists of tensors, relative to the largest value of each; not a
    number if shapes differ."""
    if len(ours) != len(theirs):
        return float("nan")
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return float("nan")
        if not a.numel():
            continue
        a, b = a.double(), b.double()
        scale = b.abs().nan_to_num().max().clamp_min(torch.finfo(torch.float32).tiny)
        off = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs()).max() / scale
        largest = max(largest, float(off.nan_to_num(torch.inf)))
    return largest


def compared(small: nn.Module, reference: nn.Module, inputs: Inputs) -> float:
    """The `difference` of what two networks return, in fp32; in fp64 where that is too large:
    thresholds and sorted scores, as in detectors, turn rounding into something else."""
    for dtype in (torch.float32, torch.float64):
        found = difference(*(outputs(model, inputs, dtype) for model in (small, reference)))
        if found <= TOLERANCE:
            break
    return found


def prove_equal(small: nn.Module, reference: nn.Module, inputs: Inputs) -> float:
    """The largest difference of all tensors that two networks return for ``inputs``, relative to
    the largest value of each. UserError above 1e-4: the slim network would be wrong.
    """
    found = compared(small, reference, inputs)
    if not found <= TOLERANCE:
        raise UserError(
            f"the slim network differs from the masked one by {found:.1e} of the largest output "
            f"(allowed: {TOLERANCE:.0e}): nothing is written. This is a bug, please report it with "
            "the checkpoint"
        )
    return found


class Comparison(NamedTuple):
    """How two networks compare: the `difference` of their outputs, not a number if one of them
    fails; the name of the first ``layer``, in the order of the forward pass, whose kept channels
    differ, which constant inputs may hide from the outputs; the ``error`` of the one that fails."""

    difference: float
    layer: str | None
    error: Exception | None

    @property
    def is_exact(self) -> bool:
        return self.layer is None and self.difference <= TOLERANCE


def compare(
    small: nn.Module,
    reference: nn.Module,
    kept: dict[str, dict[str, torch.Tensor]],
    inputs: Inputs,
) -> Comparison:
    """Compare the outputs of two networks, and of their layers the channels that are ``kept``; in
    fp64 where they differ in fp32, see `compared`. Both are left in eval mode in that dtype."""
    for dtype in (torch.float32, torch.float64):
        runs = [_run(model.eval().to(dtype), kept, inputs) for model in (small, reference)]
        error = runs[0].error or runs[1].error
        found = difference(runs[0].outputs, runs[1].outputs)
        layer = _first_different(reference, kept, runs[0].layers, runs[1].layers)
        comparison = Comparison(math.nan if error else found, layer, error)
        if comparison.is_exact:
            break
    return comparison


class _Run(NamedTuple):
    """What the layers that lose channels, and the network, have returned before an ``error``."""

    layers: list[tuple[str, torch.Tensor]]
    outputs: list[torch.Tensor]
    error: Exception | None


def _run(network: nn.Module, kept: dict[str, dict[str, torch.Tensor]], inputs: Inputs) -> _Run:
    layers: list[tuple[str, torch.Tensor]] = []
    handles = []
    for name, sides in kept.items():
        if "out" in sides or "in" in sides:  # what reads others, too

            def record(_: nn.Module, __: object, out: object, name: str = name) -> None:
                if isinstance(out, torch.Tensor) and out.dim() > 1:
                    layers.append((name, out.detach().clone()))

            handles.append(network.get_submodule(name).register_forward_hook(record))
    device, dtype = where(network)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            returned = arguments.call(network, arguments.like(inputs, device, dtype))
        return _Run(layers, arguments.tensors(returned), None)
    except Exception as error:  # the user's forward may raise anything at unexpected widths
        raise_if_of_the_machine(error)
        return _Run(layers, [], error)
    finally:
        for handle in handles:
            handle.remove()


def _first_different(
    reference: nn.Module,
    kept: dict[str, dict[str, torch.Tensor]],
    small: list[tuple[str, torch.Tensor]],
    masked: list[tuple[str, torch.Tensor]],
) -> str | None:
    for (name, ours), (_, theirs) in zip(small, masked, strict=False):
        if "out" in kept[name]:
            mask = kept[name]["out"]
            dim = -1 if isinstance(reference.get_submodule(name), nn.Linear) else 1
            if theirs.shape[dim] != len(mask):
                continue
            theirs = theirs.index_select(dim, mask.nonzero().flatten().to(theirs.device))
        if not difference([ours], [theirs]) <= TOLERANCE:
            return name
    return None
