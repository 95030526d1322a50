"""Prove that a slim network computes what the masked one does, and that it still tells inputs
apart."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from slimming.channels import inputs as arguments
from slimming.channels.groups import copied
from slimming.channels.inputs import Inputs
from slimming.channels.scaling import Masks
from slimming.errors import UserError, raise_if_of_the_machine

TOLERANCE = 1e-4


def outputs(
    model: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> list[torch.Tensor]:
    """The tensors that a copy of ``model`` returns, in eval mode on ``device``, by default where
    it is, computed in ``dtype``. A network that draws random numbers draws the same each time."""
    network = copied(model).eval().to(device, dtype)
    own = arguments.like(inputs, where(network)[0], dtype)
    with arguments.alone(), torch.random.fork_rng():
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
        largest = max(largest, _largest(a, b))
    return largest


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference relative to the largest value; what is infinite or not a number must
    be so in both."""
    if not (a.is_floating_point() and a.element_size() >= 4):
        a, b = a.double(), b.double()
    tiny = torch.finfo(torch.float32).tiny
    off = float((a - b).abs_().max()) / max(float(b.abs().max()), tiny)
    if math.isfinite(off):
        return off
    a, b = a.double(), b.double()
    scale = b.abs().nan_to_num().max().clamp_min(tiny)
    found = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs()).max() / scale
    return float(found.nan_to_num(torch.inf))


def compared(small: nn.Module, reference: nn.Module, inputs: Inputs) -> float:
    """The `difference` of what two networks return, in fp32; in fp64 where that is too large:
    thresholds and sorted scores, as in detectors, turn rounding into something else."""
    for dtype in (torch.float32, torch.float64):
        ours, theirs = (outputs(model, inputs, dtype) for model in (small, reference))
        check_finite(theirs)
        found = difference(ours, theirs)
        if found <= TOLERANCE:
            break
    return found


def check_finite(outputs: Sequence[torch.Tensor]) -> None:
    """UserError if nothing in the outputs of a network is finite, or they hold no tensor: equal
    ones prove nothing."""
    floats = [t for t in outputs if t.is_floating_point() and t.numel()]
    if not outputs or (floats and not any(t.isfinite().any() for t in floats)):
        raise UserError(
            "the outputs of the network are not finite on these inputs, so nothing can be proved: "
            "check its weights and the inputs for NaN"
        )


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
    differ, which constant inputs may hide from the outputs; the ``error`` of the one that fails;
    the ``outputs`` of the reference."""

    difference: float
    layer: str | None
    error: Exception | None
    outputs: Sequence[torch.Tensor] = ()

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
    fp64 where they differ in fp32, see `compared`, and at once where they return integers: labels
    and places of scores that rounding reorders. Both are left in eval mode in that dtype."""
    found = _compared(small, reference, kept, inputs, torch.float32, unless_integers=True)
    if found.is_exact or found.error:
        return found
    sharper = _compared(small, reference, kept, inputs, torch.float64)
    if not sharper.error:
        return sharper
    # the code of the network has tensors of its own, in fp32
    return found if found.outputs else _compared(small, reference, kept, inputs, torch.float32)


def _compared(
    small: nn.Module,
    reference: nn.Module,
    kept: dict[str, dict[str, torch.Tensor]],
    inputs: Inputs,
    dtype: torch.dtype,
    unless_integers: bool = False,
) -> Comparison:
    """The comparison in ``dtype``; none, after the run of the ``small`` one, ``unless_integers``
    are returned. The reference, which takes longer, does not run where the small one fails."""
    layers: list[tuple[str, torch.Tensor]] = []
    different: list[str] = []

    def keep(name: str, out: torch.Tensor) -> None:
        layers.append((name, out.detach().clone()))

    def check(name: str, out: torch.Tensor) -> None:
        if not layers or different:
            return
        _, ours = layers.pop()
        mask = kept[name].get("out")
        dim = -1 if isinstance(reference.get_submodule(name), nn.Linear) else 1
        if mask is not None:
            if out.shape[dim] != len(mask):  # its channels are elsewhere
                return
            out = out.index_select(dim, mask.nonzero().flatten().to(out.device))
        if not difference([ours], [out.detach()]) <= TOLERANCE:
            different.append(name)

    ours, error = _run(small.eval().to(dtype), kept, inputs, keep)
    if error:
        return Comparison(math.nan, None, error)
    if unless_integers and not all(t.is_floating_point() or t.is_complex() for t in ours):
        return Comparison(math.nan, None, None)
    layers.reverse()
    theirs, error = _run(reference.eval().to(dtype), kept, inputs, check)
    found = math.nan if error else difference(ours, theirs)
    return Comparison(found, different[0] if different else None, error, theirs)


def _run(
    network: nn.Module,
    kept: dict[str, dict[str, torch.Tensor]],
    inputs: Inputs,
    look: Callable[[str, torch.Tensor], None],
) -> tuple[list[torch.Tensor], Exception | None]:
    """What a network returns, or why it fails; ``look`` gets the name of each layer that loses
    channels, or reads those that are lost, and what it returns."""
    handles = []
    for name, sides in kept.items():
        if "out" in sides or "in" in sides:

            def seen(_: nn.Module, __: object, out: object, name: str = name) -> None:
                if isinstance(out, torch.Tensor) and out.dim() > 1:
                    look(name, out)

            handles.append(network.get_submodule(name).register_forward_hook(seen))
    device, dtype = where(network)
    try:
        with arguments.alone(), torch.random.fork_rng():
            torch.manual_seed(0)
            returned = arguments.call(network, arguments.like(inputs, device, dtype))
        return arguments.tensors(returned), None
    except Exception as error:  # the user's forward may raise anything at unexpected widths
        raise_if_of_the_machine(error)
        return [], error
    finally:
        for handle in handles:
            handle.remove()


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
