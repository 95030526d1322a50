"""Repair of a slim network: the remaining channels reproduce what the removed ones contributed.

No gradients or labels are needed. In the order of the forward pass, each layer is fitted by least
squares to map its inputs in the slim network to its outputs in the dense one, for the same samples
(He et al., ICCV 2017, 1707.06168). The running statistics of each BatchNorm are adapted to its new
inputs (Li et al., ECCV 2020, 2007.02491). Any network is repaired that runs: hooks show what its
layers read and write.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimming.channels import inputs as arguments
from slimming.channels.groups import copied
from slimming.channels.inputs import Inputs, only_logits
from slimming.channels.recording import ROOT, Call, Recording
from slimming.channels.scaling import Masks
from slimming.channels.widths import BATCH_NORMS, BatchNorm
from slimming.choosing.moments import (
    Fitted,
    Moments,
    add_to_weight,
    batch_size,
    best_ridge,
    centre,
    channel_dim,
    draw,
    matrix,
    obstacle,
    patches,
    picked,
    positions,
)
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.repair.one_pass import move_statistics, rows
from slimming.repair.streaming import FEWEST, Stream, Sums
from slimming.runtime import optional
from slimming.runtime.device import LAYOUT, full_fp32

HELD_OUT = 8  # 1 of 8 samples judges the result, and 1 of 8 batches chooses the ridge strength
POSITIONS = 32_768  # of a layer's output that are fitted, over all samples
TARGETS = 2**30  # bytes of what dense layers put out at these positions, kept at a time
STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)  # of the ridge, relative to the variance of the inputs
DIVERGENCE, RELATIVE_ERROR = "divergence (nats)", "relative error"
CHECKED = 64  # positions at which it is checked that a layer is linear,
CLOSE = 1e-3  # and the difference, relative to the largest value, that is rounding
CONSTANT = 1e-6  # a channel with a smaller range, relative to its largest value, is constant


@dataclass(frozen=True)
class Repaired:
    """A slim network, repaired if that ``helped``: ``model``, in eval mode on the device of the
    inputs, in the dtype that it had. ``before`` and ``after``: how far its outputs are from those
    of the dense network on samples held out from the fit, see `distance`; ``measure`` names the
    measure. ``images``: how many samples were used; ``notes`` name the layers left as they were,
    and why.
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
    inputs: Inputs,
    seed: int = 0,
    weights: bool = True,
) -> Repaired:
    """Repair ``slim``, the ``dense`` network without what is not in ``kept`` (layer -> side -> one
    bool for each channel), on ``inputs``: samples of the training data as the network reads them, a
    tensor (N, ...), a tuple of arguments or a dict of them.

    Without ``weights`` only the statistics of BNs are adapted. Neither network is changed. The same
    arguments give the same result. It is computed in fp64 if the network is in fp64, else in fp32,
    and rounded to the dtype of the network. UserError for fewer than 32 samples, or a network that
    fails on them.
    """
    count = arguments.count(inputs)
    if count < FEWEST:
        raise UserError(f"repair needs at least {FEWEST} images, not {count}")
    device = arguments.tensors(inputs)[0].device
    dtype = torch.double if _has_fp64(slim) else torch.float
    inputs = arguments.like(inputs, device, dtype)
    original = slim
    slim, dense, layout = _ready(slim, dense, arguments.first(inputs, 1), device, dtype)
    inputs = _in_layout(inputs, layout)
    size = count // HELD_OUT
    judged, fitted = arguments.part(inputs, 0, size), arguments.part(inputs, size, count)
    batch = min(batch_size(inputs), -(-(count - size) // HELD_OUT))
    notes = _Repair(slim, dense, kept, arguments.split(fitted, batch), seed, weights).run()
    unchanged = _laid_out(copied(original).to(device), layout).eval()
    repaired = copied(unchanged)
    repaired.load_state_dict(slim.state_dict())  # rounds to the dtypes that it had
    before, measure = distance(_laid_out(_cast(unchanged, dtype), layout), dense, judged)
    after, _ = distance(_laid_out(_cast(repaired, dtype), layout), dense, judged)
    model = repaired if after < before else unchanged
    return Repaired(model, before, after, count, notes, measure)


def _has_fp64(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.double for parameter in model.parameters())


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copied(model).to(dtype)


def _laid_out(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    return model if layout == torch.contiguous_format else model.to(memory_format=layout)


def _in_layout(inputs: Inputs, layout: torch.memory_format) -> Inputs:
    return arguments.mapped(
        inputs, lambda t: t.contiguous(memory_format=layout) if t.dim() == 4 else t
    )


def _ready(
    slim: nn.Module, dense: nn.Module, one: Inputs, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module, torch.memory_format]:
    """Copies in eval mode, for inputs like ``one``, and the memory layout in which they run: the
    fastest, if they do. UserError if they run in none."""
    failure: Exception | None = None
    for layout in (LAYOUT, torch.contiguous_format):
        try:
            both = [
                _laid_out(copied(model).to(device, dtype), layout).eval() for model in (slim, dense)
            ]
            for model in both:
                arguments.call(model, arguments.mapped(_in_layout(one, layout), torch.clone))
            return both[0], both[1], layout
        except Exception as error:  # in the forward pass of the network
            raise_if_of_the_machine(error)
            failure = error
    reason = " ".join(str(failure).split())[:200]
    raise UserError(
        f"repair runs the network in {str(dtype).removeprefix('torch.')}, where it fails: {reason}"
    ) from failure


@torch.no_grad()
def distance(model: nn.Module, dense: nn.Module, inputs: Inputs) -> tuple[float, str]:
    """How far the outputs of ``model`` are from those of ``dense``, and the name of the measure:
    `divergence` of logits (N, C, ...), one tensor; of other outputs the relative error
    ‖ours - theirs‖ / ‖theirs‖, the mean over their tensors. Outputs with one class, (N, 1, ...) or
    (N,), are no logits: their softmax is always 1."""
    theirs = arguments.call(dense, arguments.first(inputs, 1))
    if isinstance(theirs, torch.Tensor) and theirs.dim() > 1 and theirs.shape[1] > 1:
        return divergence(model, dense, inputs), DIVERGENCE
    errors: list[float] = []
    totals: list[float] = []
    for batch in arguments.split(inputs, batch_size(inputs)):
        outputs = (_numbers(arguments.call(m, batch)) for m in (model, dense))
        for place, (ours, theirs) in enumerate(zip(*outputs, strict=False)):
            if place == len(errors):
                errors.append(0.0)
                totals.append(0.0)
            total = float(theirs.square().sum())
            same = ours.shape == theirs.shape  # detections may be more or fewer
            errors[place] += float((ours - theirs).square().sum()) if same else total
            totals[place] += total
    relative = [(e / t if t else e) ** 0.5 for e, t in zip(errors, totals, strict=True)]
    return sum(relative) / max(1, len(relative)), RELATIVE_ERROR


def _numbers(outputs: object) -> list[torch.Tensor]:
    """The tensors of floats in what a network returns."""
    return [t.double() for t in arguments.tensors(outputs) if t.is_floating_point()]


@torch.no_grad()
def divergence(model: nn.Module, dense: nn.Module, inputs: Inputs) -> float:
    """Mean Kullback-Leibler divergence, in nats, of the predictions of ``model`` from those of
    ``dense``."""
    total = 0.0
    for batch in arguments.split(inputs, batch_size(inputs)):
        outputs = [only_logits(arguments.call(m, batch)) for m in (model, dense)]
        ours, theirs = (logits.log_softmax(1) for logits in outputs)
        total += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
    return total / arguments.count(inputs)


@dataclass(frozen=True)
class Step:
    """A layer, with weights or a BN, that is repaired, when ``time`` has come.

    ``norm``: the name of the BN that alone reads what it puts out, and moves with it; ``total``: it
    is the end of a residual branch, its output, or that of ``norm``, being a term of a sum;
    ``bits``: itself and ``norm``, ``before``: the layers that it depends on, see `Recording`;
    ``lost``: which of its inputs are gone, if any; ``left``: why it cannot be fitted.
    """

    name: str
    time: float
    before: int
    bits: int
    norm: str | None = None
    total: bool = False
    lost: torch.Tensor | None = None
    left: str | None = None

    @property
    def last(self) -> str:
        """The module whose output is a term of the sum."""
        return self.norm or self.name


@dataclass
class Wanted:
    """What one layer of the dense network does, at some ``places`` of each batch and call:
    ``values`` in the channels that the slim network keeps, ``middle``, their mean in the centre of
    maps, and whether the inputs that the slim layer has lost are ``constant``."""

    places: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    values: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    middles: list[torch.Tensor] = field(default_factory=list)
    lows: list[torch.Tensor] = field(default_factory=list)
    highs: list[torch.Tensor] = field(default_factory=list)

    @property
    def middle(self) -> torch.Tensor:
        return torch.cat(self.middles).mean(0)

    @property
    def constant(self) -> bool:
        """Whether all lost inputs are the same number in all places of all samples, as behind
        γ = 0."""
        low, high = torch.stack(self.lows).amin(0), torch.stack(self.highs).amax(0)
        return bool((high - low <= CONSTANT * torch.maximum(high.abs(), low.abs())).all())


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be repaired, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (Fitted, *BATCH_NORMS))}


def _not_linear(model: nn.Module, one: Inputs) -> set[str]:
    """The layers that do not put out their weights times what they read, as subclasses may."""
    found, generator = set(), torch.Generator().manual_seed(0)

    def look(name: str, layer: Fitted, given: Any, out: torch.Tensor) -> None:
        read, dim = arguments.tensors(given)[0], channel_dim(layer)
        try:
            places = draw(positions(out, dim), CHECKED, generator)
            ours = (patches(layer, read, places) @ matrix(layer).mT).transpose(0, 1).flatten(1)
            ours = ours if layer.bias is None else ours + layer.bias
            theirs = picked(out, dim, places)
            close = bool((ours - theirs).abs().max() <= CLOSE * theirs.abs().max())
        except (RuntimeError, ValueError, IndexError):  # without a batch, or of another shape
            close = False
        if not close:
            found.add(name)

    hooks = [
        layer.register_forward_hook(
            lambda layer, args, kwargs, out, name=name: look(name, layer, (args, kwargs), out),
            with_kwargs=True,
        )
        for name, layer in layers_of(model).items()
        if isinstance(layer, Fitted) and not obstacle(layer)
    ]
    try:
        arguments.call(model, arguments.mapped(one, torch.clone))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _avoid_in_place(model: nn.Module, one: Inputs) -> None:
    """Let activations write new tensors, if that makes no difference: see `Stream.resumes`."""
    modules: list[Any] = [m for m in model.modules() if getattr(m, "inplace", False) is True]

    def outputs() -> list[torch.Tensor]:
        return arguments.tensors(arguments.call(model, arguments.mapped(one, torch.clone)))

    before = outputs()
    for module in modules:
        module.inplace = False
    if not all(a.equal(b) for a, b in zip(before, outputs(), strict=True)):
        for module in modules:
            module.inplace = True


class _Repair:
    """Both networks on the same batches: the dense one runs once, the slim one up to each layer."""

    def __init__(
        self,
        slim: nn.Module,
        dense: nn.Module,
        kept: dict[str, Masks],
        batches: list[Inputs],
        seed: int,
        weights: bool,
    ):
        self.slim, self.dense, self.kept, self.batches = slim, dense, kept, batches
        self.weights, self.generator = weights, torch.Generator().manual_seed(seed)
        self.shifted = 0  # these layers of the networks differ by constants,
        self.differs = 0  # and these by more
        one = arguments.first(batches[0], 1)
        _avoid_in_place(slim, one)
        self.recording, other = (
            Recording(model, layers_of(model)).run(arguments.mapped(one, torch.clone))
            for model in (slim, dense)
        )
        runs = [
            [call.key for call in recording.calls if call.key.name in recording.bits]
            for recording in (self.recording, other)
        ]
        if runs[0] != runs[1]:  # a channel selection may run in one of them only
            raise UserError("the slim network is not the dense one without some channels")
        self.other = _not_linear(dense, one)
        self.stream = Stream(slim, batches, self.recording)
        self.steps = self._planned()

    # the plan

    def _planned(self) -> list[Step]:
        """The layers whose inputs change, in the order in which they are repaired."""
        steps: dict[str, Step] = {}
        calls: dict[str, list[Call]] = {}
        for call in self.recording.calls:
            calls.setdefault(call.key.name, []).append(call)
        alone = {name: found[0] for name, found in calls.items() if len(found) == 1}
        written = {call.writes[0]: call for call in alone.values() if len(call.writes) == 1}
        read_by = {call.reads[0]: name for name, call in alone.items() if len(call.reads) == 1}
        for name, layer in layers_of(self.slim).items():
            if name not in calls or not self._has_one_tensor(calls[name]):
                continue
            found, bit = calls[name], self.recording.bits[name]
            before = 0
            for call in found:
                before |= call.before
            lost = self.kept.get(name, {}).get("in") if isinstance(layer, Fitted) else None
            step = Step(name, found[-1].time, before, bit, lost=None if lost is None else ~lost)
            if isinstance(layer, Fitted):
                left = obstacle(layer)
                if name in self.other:
                    left = "it computes something else than its weights say"
                if before & bit:
                    left = "it reads what it has put out"
                step = replace(step, left=left)
                if name in alone and self.weights and not left:
                    step = self._with_norm_and_sum(step, alone[name], read_by, written)
            steps[name] = step
        for step in list(steps.values()):
            if step.norm:
                steps.pop(step.norm, None)
        order = sorted(steps.values(), key=lambda step: step.time)
        changed, needed = 0, []
        for step in order:
            if step.lost is not None or step.before & changed:
                changed |= step.bits
                needed.append(step)
        return needed

    def _has_one_tensor(self, calls: list[Call]) -> bool:
        return all(len(call.reads) == len(call.writes) == 1 for call in calls)

    def _with_norm_and_sum(
        self, step: Step, call: Call, read_by: dict[int, str], written: dict[int, Call]
    ) -> Step:
        """The step with the BN directly behind the layer, and the sum behind both, if any."""
        last = call
        norm = self._only_reader(call, read_by)
        if norm:
            (last,) = self.recording.calls_of(norm)
            step = replace(step, norm=norm, bits=step.bits | self.recording.bits[norm])
        (value,) = last.writes
        if len(self.recording.readers[value]) != 1:
            return step
        behind = self.slim.get_submodule(norm) if norm else None
        if isinstance(behind, BATCH_NORMS) and behind.running_mean is None:
            return step  # it normalises by the statistics of each batch
        for found in self.recording.sums:
            if value not in found.terms or found.terms[0] == found.terms[1]:
                continue
            other = found.terms[found.terms[0] == value]
            upstream = self.recording.upstream[other]
            ours, theirs = (layers.bit_count() for layers in (last.behind, upstream))
            first = other in written and (theirs, written[other].time) > (ours, last.time)
            if not upstream & step.bits and not first:  # of two branches the longer one is the last
                return replace(step, time=found.time, total=True)
        return step

    def _only_reader(self, call: Call, read_by: dict[int, str]) -> str | None:
        """The name of the BN that alone reads what a call returned, and runs once."""
        (value,) = call.writes
        name = read_by.get(value)
        if name is None or not isinstance(self.slim.get_submodule(name), BATCH_NORMS):
            return None
        readers = self.recording.readers[value]
        inside = [r != ROOT and self.recording.calls[r].key.name == name for r in readers]
        return name if inside and all(inside) else None

    # the run

    def run(self) -> list[str]:
        """Repair the slim network in place; the layers that are left as they were, and why."""
        notes, count = [], len(self.batches)
        pending = 0
        for step in self.steps:
            pending |= step.bits
        parts = self._parts()
        with optional.bar(
            total=(len(self.steps) + len(parts)) * count, desc="repair", leave=False, disable=None
        ) as bar:
            for part in parts:
                found = self._observed(part, bar)
                for step in part:
                    self.stream.settle(pending)
                    reason = self._repaired(step, found.pop(step.name), bar)
                    notes += [f"{step.name} is left as it was: {reason}"] if reason else []
                    pending &= ~step.bits
        return notes

    def _parts(self) -> list[list[Step]]:
        """The steps in parts, so that `TARGETS` has room for what the dense layers of one do."""
        parts: list[list[Step]] = []
        room = 0
        for step in self.steps:
            layer = self.slim.get_submodule(step.name)
            assert isinstance(layer, (Fitted, *BATCH_NORMS))
            channels = layer.num_features if isinstance(layer, BATCH_NORMS) else len(layer.weight)
            room -= POSITIONS * 4 * channels
            if not parts or room < 0:
                parts.append([])
                room = TARGETS - POSITIONS * 4 * channels
            parts[-1].append(step)
        return parts

    def _observed(self, steps: list[Step], bar: Any) -> dict[str, Wanted]:
        """What the dense network does in these layers."""
        found = {step.name: Wanted() for step in steps}
        for b in range(len(self.batches)):
            self._observe_batch(steps, found, b)
            bar.update()
        return found

    def _observe_batch(self, steps: list[Step], found: dict[str, Wanted], b: int) -> None:
        terms: dict[int, tuple[Step, torch.Tensor]] = {}
        count = dict.fromkeys(found, 0)

        def look(step: Step, given: Any, out: torch.Tensor) -> None:
            key = (b, count[step.name])
            count[step.name] += 1
            read = arguments.tensors(given)[0]
            norm = isinstance(self.dense.get_submodule(step.name), BATCH_NORMS)
            self._observe(found[step.name], step, key, read, read if norm else out)

        def note(step: Step, out: torch.Tensor) -> None:
            terms[id(out)] = (step, out)  # with the tensor, so that no other has its id

        def added(known: tuple[Step, torch.Tensor], _: torch.Tensor, total: torch.Tensor) -> None:
            step = known[0]
            wanted, dim = found[step.name], channel_dim(self.dense.get_submodule(step.last))
            value = picked(total, dim, wanted.places[b, 0])
            wanted.values[b, 0] = self._kept(value, step.last)

        hooks: list[Any] = []
        for step in steps:
            layer, last = map(self.dense.get_submodule, (step.name, step.last))
            hooks.append(
                layer.register_forward_hook(
                    lambda _, args, kwargs, out, step=step: look(step, (args, kwargs), out),
                    with_kwargs=True,
                )
            )
            if step.total:
                hooks.append(
                    last.register_forward_hook(lambda _, __, out, step=step: note(step, out))
                )
        try:
            with Sums(terms, added):
                arguments.call(self.dense, arguments.mapped(self.batches[b], torch.clone))
        finally:
            for hook in hooks:
                hook.remove()

    def _observe(
        self,
        wanted: Wanted,
        step: Step,
        key: tuple[int, int],
        read: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        dim = channel_dim(self.dense.get_submodule(step.name))
        shape = positions(value, dim)
        count = POSITIONS * shape[0] // sum(map(arguments.count, self.batches))
        count //= len(self.recording.calls_of(step.name))
        wanted.places[key] = draw(shape, max(1, count), self.generator)
        wanted.values[key] = self._kept(picked(value, dim, wanted.places[key]), step.name)
        wanted.middles.append(self._kept(picked(value, dim, centre(shape)), step.name))
        if step.lost is not None:
            inputs = rows(read) if dim == 1 else read.flatten(0, -2)
            gone = inputs[:, step.lost.to(inputs.device)]
            wanted.lows.append(gone.amin(0))
            wanted.highs.append(gone.amax(0))

    def _kept(self, values: torch.Tensor, layer: str) -> torch.Tensor:
        """The channels of ``values`` (n, C) that are left after a layer."""
        out = self.kept.get(layer, {}).get("out")
        return values if out is None else values[:, out.to(values.device)]

    def _repaired(self, step: Step, wanted: Wanted, bar: Any) -> str | None:
        """Repair a layer; why it is left as it was, if it is."""
        layer = self.slim.get_submodule(step.name)
        norm = self.slim.get_submodule(step.norm) if step.norm else None
        differs = bool(step.before & self.differs)
        if isinstance(layer, BATCH_NORMS):
            if layer.running_mean is None:
                return None  # it normalises by the statistics of each batch
            if differs:
                self._recalibrate(layer, step, wanted, bar)
            elif step.before & self.shifted:
                layer.running_mean -= self._shift(step, wanted, bar)
            return None
        assert isinstance(layer, Fitted)
        constant = step.lost is not None and not differs and wanted.constant
        if step.lost is not None and not constant:
            differs = True
        if not differs:
            self._restore(layer, norm, step, wanted, constant, bar)
            return None
        self.differs |= step.bits
        if step.left or not self.weights:
            return step.left
        self._fit(layer, norm, step, wanted, bar)
        return None

    def _restore(
        self,
        layer: Fitted,
        norm: nn.Module | None,
        step: Step,
        wanted: Wanted,
        constant: bool,
        bar: Any,
    ) -> None:
        """Add what constants contributed to the bias of a layer, or to the BN behind it."""
        if constant:
            self.shifted |= step.bits
        if constant and layer.bias is not None:
            layer.bias += self._shift(step, wanted, bar, before=False)
        elif isinstance(norm, BATCH_NORMS) and norm.running_mean is not None:
            norm.running_mean -= self._shift(step, wanted, bar, before=False)

    def _shift(self, step: Step, wanted: Wanted, bar: Any, before: bool = True) -> torch.Tensor:
        """By how much the dense network's value exceeds the slim one's, for each channel, in the
        centre of maps: zero padding takes from constants at the borders."""
        dim = channel_dim(self.slim.get_submodule(step.name))

        def take(_: int, value: torch.Tensor) -> torch.Tensor:
            return picked(value, dim, centre(positions(value, dim)))

        found = []
        for b in range(len(self.batches)):
            found += self.stream.taken(b, step.name, take, before)
            bar.update()
        return wanted.middle - torch.cat(found).mean(0)

    def _recalibrate(self, norm: BatchNorm, step: Step, wanted: Wanted, bar: Any) -> None:
        """Move the running statistics of a BN as those of its input have moved."""
        ours, theirs = _Spread(), _Spread()
        for b in range(len(self.batches)):

            def take(k: int, value: torch.Tensor, b: int = b) -> torch.Tensor:
                return picked(value, 1, wanted.places[b, k])

            for k, values in enumerate(self.stream.taken(b, step.name, take)):
                ours.add(values)
                theirs.add(wanted.values[b, k])
            bar.update()
        _move(norm, ours.mean, ours.var, theirs)
        self.differs |= step.bits

    def _fit(
        self, layer: Fitted, norm: nn.Module | None, step: Step, wanted: Wanted, bar: Any
    ) -> None:
        """Give a layer the weights that reproduce what is wanted best from what it reads."""
        weight = matrix(layer)
        groups, outputs, features = weight.shape
        sizes = (groups, features, outputs, weight.device)
        moments, theirs = (Moments(*sizes), Moments(*sizes)), _Spread()
        batches = len(self.batches)
        for b in range(batches):
            for x, target in self._samples(layer, norm, step, wanted, b):
                theirs.add(target)
                short = target if layer.bias is None else target - layer.bias
                short = short.unflatten(1, (groups, -1)).transpose(0, 1) - x @ weight.mT
                moments[b >= batches - max(1, batches // HELD_OUT)].add(x, short)
            bar.update()
        slope, intercept = best_ridge(*moments, STRENGTHS)
        add_to_weight(layer, slope.mT)
        if layer.bias is not None:
            layer.bias += intercept.flatten()
        if isinstance(norm, BATCH_NORMS) and norm.running_mean is not None:
            mean, var = _put_out(layer, moments[0])
            _move(norm, mean, var, theirs)

    def _samples(
        self, layer: Fitted, norm: nn.Module | None, step: Step, wanted: Wanted, b: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What a layer of the slim network reads in the batch ``b`` (groups, n, F), and what it
        should put out (n, O).

        At the end of a residual branch that is what the dense sum, not the dense branch, needs: the
        errors of the shortcut are made up for, and do not add up from block to block.
        """

        def take(k: int, read: torch.Tensor) -> torch.Tensor:
            return patches(layer, read, wanted.places[b, k])

        if not step.total:
            found = self.stream.taken(b, step.name, take)
            return [(x, wanted.values[b, k]) for k, x in enumerate(found)]
        dim = channel_dim(self.slim.get_submodule(step.last))

        def other_term(_: int, value: torch.Tensor) -> torch.Tensor:
            return picked(value, dim, wanted.places[b, 0])

        x, other = self.stream.taken_and_other_term(b, step.name, step.last, take, other_term)
        value = wanted.values[b, 0] - other
        return [(x, _before(norm, value) if isinstance(norm, BATCH_NORMS) else value)]


class _Spread:
    """Mean and variance (C,) of rows (n, C), in fp64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[torch.Tensor] = []
        self.squares: list[torch.Tensor] = []

    def add(self, values: torch.Tensor) -> None:
        """Count n more rows."""
        self.count += len(values)
        self.sums.append(values.sum(0, dtype=torch.double))
        self.squares.append(values.double().square().sum(0))

    @property
    def mean(self) -> torch.Tensor:
        return torch.stack(self.sums).sum(0) / self.count

    @property
    def var(self) -> torch.Tensor:
        squares = torch.stack(self.squares).sum(0) / self.count
        return (squares - self.mean.square()).clamp_min(0)


def _move(norm: BatchNorm, mean: torch.Tensor, var: torch.Tensor, before: _Spread) -> None:
    """Move the running statistics of a BN as those of its input have moved."""
    move_statistics(norm, mean - before.mean, var, before.var)


def _put_out(layer: Fitted, moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (O,) of what a layer puts out for the samples of these moments."""
    weight = matrix(layer).double()
    mean = (weight @ (moments.x / moments.count).mT).flatten()
    var = (weight @ moments.covariance() * weight).sum(2).flatten().clamp_min(0)
    return mean if layer.bias is None else mean + layer.bias, var


def _before(norm: BatchNorm, value: torch.Tensor) -> torch.Tensor:
    """The input (n, C) for which a BN in eval mode returns ``value``; its running mean where γ is
    0."""
    assert norm.running_mean is not None and norm.running_var is not None  # see Step.total
    deviation = (norm.running_var + norm.eps).sqrt()
    scale = norm.weight / deviation if norm.affine else 1 / deviation
    inverse = torch.where(scale.abs() > torch.finfo(scale.dtype).eps, 1 / scale, 0)
    centred = value - norm.bias if norm.affine else value
    return centred * inverse + norm.running_mean
