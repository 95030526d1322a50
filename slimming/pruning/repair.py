"""Repair of a slim network: the remaining channels reproduce what the removed ones contributed.

No gradients or labels are needed. In the order of the forward pass, each layer is fitted by least
squares to map its inputs in the slim network to its outputs in the dense one, for the same images
(He et al., ICCV 2017, 1707.06168). The running statistics of each BatchNorm are adapted to its new
inputs (Li et al., ECCV 2020, 2007.02491).
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from slimming.channels.inputs import only_logits
from slimming.channels.scaling import Masks
from slimming.channels.widths import BATCH_NORMS, BatchNorm
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.pruning.activations import BATCH, LEAST, MEMORY, count_within
from slimming.pruning.least_squares import Moments, best_ridge
from slimming.pruning.patches import obstacle, rows, sample
from slimming.pruning.side_by_side import SideBySide
from slimming.pruning.statistics import mean_and_variance, move_statistics
from slimming.runtime import optional
from slimming.runtime.device import layout_for
from slimming.runtime.precision import full_fp32

HELD_OUT = 8  # 1 of 8 images judges the result, and 1 of 8 batches chooses the ridge strength
POSITIONS = 32_768  # sampled positions of the output of a layer, over all images
STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)  # of the ridge, relative to the variance of the inputs
DIVERGENCE, RELATIVE_ERROR = "divergence (nats)", "relative error"
CONSTANT = 1e-6  # a channel with a smaller range, relative to its largest value, is constant


@dataclass(frozen=True)
class Repaired:
    """A slim network, repaired if that ``helped``: ``model``, in eval mode on the device of the
    images, in the dtype that it had. ``before`` and ``after``: how far its outputs are from those
    of the dense network on images held out from the fit, see `distance`; ``measure`` names the
    measure. ``images``: how many were used; ``notes`` name the layers left as they were, and why.
    """

    model: nn.Module
    before: float
    after: float
    images: int
    notes: list[str] = field(default_factory=list)
    measure: str = DIVERGENCE

    @property
    def helped(self) -> bool:
        return self.after < self.before

    def __str__(self) -> str:
        """The distances, and what was done if they did not fall."""
        told = f"{self.measure} from the dense network {self.before:.4g} -> {self.after:.4g}"
        return told if self.helped else f"{told}: not closer, so the repair was discarded"


@full_fp32()
@torch.no_grad()
def repair(
    slim: nn.Module,
    dense: nn.Module,
    kept: dict[str, Masks],
    images: torch.Tensor,
    seed: int = 0,
    weights: bool = True,
) -> Repaired:
    """Repair ``slim``, the ``dense`` network without what is not in ``kept`` (layer -> side -> one
    bool for each channel), on ``images`` (N, 3, H, W) of the training data, normalised.

    Without ``weights`` only the statistics of BNs are adapted. Neither network is changed. The same
    arguments give the same result. It is computed in fp64 if the network is in fp64, else in fp32,
    and rounded to the dtype of the network. Of images so large that their activations would take
    more than 3 GiB, only the first are used. UserError for fewer than 32 images, or a network that
    torch.fx cannot trace or that fails on them.
    """
    if len(images) < LEAST:
        raise UserError(f"repair needs at least {LEAST} images, not {len(images)}")
    images = images.to(torch.double if _has_fp64(slim) else torch.float)
    layout = _layout(dense, images[:1])
    images = images.to(memory_format=layout)
    original, slim, dense = slim, _ready(slim, images, layout), _ready(dense, images, layout)
    images = images[: max(LEAST, count_within(MEMORY, images[:1], slim, dense))]
    judged, fitted = images.split([size := len(images) // HELD_OUT, len(images) - size])
    batches = list(fitted.split(min(BATCH, -(-len(fitted) // HELD_OUT))))
    pair = SideBySide(slim, dense, kept, batches)
    notes = _Repair(pair, seed, weights).run()
    unchanged = copy.deepcopy(original).to(images.device).to(memory_format=layout).eval()
    repaired = copy.deepcopy(unchanged)
    repaired.load_state_dict(pair.slim.model.state_dict())  # rounds to the dtypes that it had
    before, measure = distance(slim, dense, judged)
    after, _ = distance(_ready(repaired, images, layout), dense, judged)
    model = repaired if after < before else unchanged
    return Repaired(model, before, after, len(images), notes, measure)


def _ready(model: nn.Module, images: torch.Tensor, layout: torch.memory_format) -> nn.Module:
    """A copy that reads ``images``."""
    return copy.deepcopy(model).to(images.device, images.dtype).to(memory_format=layout).eval()


def _has_fp64(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.double for parameter in model.parameters())


def _layout(dense: nn.Module, image: torch.Tensor) -> torch.memory_format:
    """The memory layout in which the network runs. UserError if it runs in none."""
    model = _ready(dense, image, torch.contiguous_format)
    layout = layout_for(model, image)
    if layout == torch.contiguous_format:
        try:
            model(image.clone())
        except RuntimeError as error:  # in the forward pass of the network
            raise_if_of_the_machine(error)
            dtype, reason = str(image.dtype).removeprefix("torch."), " ".join(str(error).split())
            raise UserError(
                f"repair runs the network in {dtype}, where it fails: {reason[:200]}"
            ) from error
    return layout


@torch.no_grad()
def distance(model: nn.Module, dense: nn.Module, images: torch.Tensor) -> tuple[float, str]:
    """How far the outputs of ``model`` are from those of ``dense``, and the name of the measure:
    `divergence`, or the relative error ‖ours - theirs‖ / ‖theirs‖ of outputs without several
    classes (N, 1, ...) or (N,), whose softmax is always 1."""
    theirs = only_logits(dense(images[:1]))
    if theirs.dim() > 1 and theirs.shape[1] > 1:
        return divergence(model, dense, images), DIVERGENCE
    error = total = 0.0
    for batch in images.split(BATCH):
        ours, theirs = (only_logits(m(batch)).double() for m in (model, dense))
        error += float((ours - theirs).square().sum())
        total += float(theirs.square().sum())
    return (error / total) ** 0.5 if total else error**0.5, RELATIVE_ERROR


@torch.no_grad()
def divergence(model: nn.Module, dense: nn.Module, images: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence, in nats, of the predictions of ``model`` from those of
    ``dense``."""
    total = 0.0
    for batch in images.split(BATCH):
        ours, theirs = (only_logits(m(batch)).log_softmax(1) for m in (model, dense))
        total += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
    return total / len(images)


class _Repair:
    """One pass through both networks."""

    def __init__(self, pair: SideBySide, seed: int, weights: bool):
        self.weights = weights
        self.pair, self.generator = pair, torch.Generator().manual_seed(seed)
        self.shifted = False  # from here on the networks differ by constants,
        self.differs = False  # and from here on by more
        called = [node.target for node in pair.slim.order if node.op == "call_module"]
        self.shared = {target for target in called if called.count(target) > 1}

    def run(self) -> list[str]:
        """Repair the slim network in place; the layers that are left as they were, and why."""
        notes = []
        with optional.bar(
            total=len(self.pair.slim.order), desc="repair", leave=False, disable=None
        ) as bar:
            for node, layer in self.pair.steps():
                if isinstance(layer, BATCH_NORMS):
                    self._recalibrate(layer, node)
                elif isinstance(layer, nn.Conv2d | nn.Linear):
                    reason = self._reconstruct(layer, node)
                    notes += [f"{node.target} is left as it was: {reason}"] if reason else []
                bar.update()
        return notes

    def _reconstruct(self, layer: nn.Conv2d | nn.Linear, node: fx.Node) -> str | None:
        """Fit a layer that lost inputs, or reads what differs; why not, if it cannot be."""
        lost = self.pair.lost(node)
        if lost is not None and not self.differs and self._are_constant(node, lost):
            self.shifted = True
            if layer.bias is not None:
                layer.bias += self._shift(node)
            return None
        self.differs |= lost is not None
        reason = "it runs more than once" if node.target in self.shared else obstacle(layer)
        if not self.differs or reason or not self.weights:
            return reason if self.differs else None
        slope, intercept = best_ridge(*self._moments(layer, node), STRENGTHS)
        layer.weight += slope.mT.reshape(layer.weight.shape)
        if layer.bias is not None:
            layer.bias += intercept.flatten()
        return None

    def _are_constant(self, node: fx.Node, lost: torch.Tensor) -> bool:
        """Whether all inputs that a layer lost are the same number in all places of all images, as
        behind γ = 0."""
        reads = [rows(self.pair.read_dense(node, b))[:, lost] for b in self.pair.batches]
        low = torch.stack([values.amin(0) for values in reads]).amin(0)
        high = torch.stack([values.amax(0) for values in reads]).amax(0)
        return bool((high - low <= CONSTANT * torch.maximum(high.abs(), low.abs())).all())

    def _shift(self, node: fx.Node, layer: str | None = None) -> torch.Tensor:
        """By how much the dense network's value at ``node`` exceeds the slim one's, for each
        channel, in the centre of the maps: zero padding takes from constants at the borders."""
        shifts = []
        for b in self.pair.batches:
            shift = self.pair.wanted(node, b, layer) - self.pair.slim.value(node, b)
            shifts.append(
                shift[..., shift.shape[2] // 2, shift.shape[3] // 2] if shift.dim() == 4 else shift
            )
        return torch.cat(shifts).mean(0)

    def _moments(self, layer: nn.Conv2d | nn.Linear, node: fx.Node) -> tuple[Moments, Moments]:
        """Of what ``layer`` reads and what its outputs fall short by: the moments over most
        batches, and over those held back."""
        groups = getattr(layer, "groups", 1)
        weight = layer.weight.flatten(1).unflatten(0, (groups, -1))
        sizes = (groups, weight.shape[2], weight.shape[1], weight.device)
        moments, batches = (Moments(*sizes), Moments(*sizes)), self.pair.batches
        count = POSITIONS // len(batches)
        for b in batches:
            read, target = self.pair.read(node, b), self.pair.target(node, b)
            x, wanted = sample(layer, read, target, count, self.generator)
            short = wanted if layer.bias is None else wanted - layer.bias
            short = short.unflatten(1, (groups, -1)).transpose(0, 1) - x @ weight.mT
            moments[b >= len(batches) - max(1, len(batches) // HELD_OUT)].add(x, short)
        return moments

    def _recalibrate(self, norm: BatchNorm, node: fx.Node) -> None:
        """Move the running statistics of a BN as those of its input have moved."""
        if not (self.differs or self.shifted) or norm.running_mean is None:
            return  # without running statistics a BN uses those of each batch
        source = node.all_input_nodes[0]
        if self.differs:
            pair, name = self.pair, str(node.target)
            mean, var = mean_and_variance(pair.slim.value(source, b) for b in pair.batches)
            target = (pair.target(source, b, name) for b in pair.batches)
            mean_before, var_before = mean_and_variance(target)
            move_statistics(norm, mean - mean_before, var, var_before)
        else:
            norm.running_mean -= self._shift(source, str(node.target))
