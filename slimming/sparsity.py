"""In a training loop of one's own: sparsify what can be pruned, slim in rounds, carry the state of
the optimizer over, and learn from the dense network."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from slimming.channels import inputs as arguments
from slimming.channels.groups import Group, copied
from slimming.channels.inputs import Inputs
from slimming.channels.kinds import Convolution, kind_of
from slimming.channels.widths import BATCH_NORMS, BatchNorm
from slimming.choosing import ranking
from slimming.choosing.importance import MEASURES, Evidence, scaled_norms
from slimming.choosing.threshold import LEAST, NEAR_ZERO
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.reports.tables import table
from slimming.slicing.proof import sample
from slimming.slicing.prune import prunable, some
from slimming.slicing.slim import Kept, slice_tensors, slim_to
from slimming.training.penalties import PENALTIES, Factors

SCHEDULES: dict[str, Callable[[float], float]] = {  # the share of ``s``, by the share of the steps
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - 0.9 * min(done, 1.0),
    "half": lambda done: float(done < 0.5),
}
STILL = (*BATCH_NORMS, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
RATIOS = (0.3, 0.5, 0.7)  # that a summary tells the cost of


class Sparsity:
    """The penalty of Network Slimming on what can be pruned of ``model``, in any training loop:

        sparsity = slimming.Sparsity(model, images, s=1e-4)
        for images, labels in loader:
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            sparsity.on_gradients()  # with a GradScaler after scaler.unscale_(optimizer)
            optimizer.step()
            sparsity.after_step()

    Where the loop is not yours, ``sparsity.attach(optimizer)`` makes both calls.

    The penalty is s · Σ ‖γ_u‖₂ / √k over the units u of coupled channels, with k scaling factors γ
    each: s · Σ|γ| (Liu et al., ICCV 2017, eq. 1) where one BatchNorm scales a unit, a group lasso
    where several do, as in a residual sum, with the strength of one. γ of channels that cannot go
    are left alone. Of a group without BatchNorm ‖w_u‖₂ of all weights of its units is penalised,
    those that write and those that read them (Fang et al., CVPR 2023, 2301.12900).

    ``penalty``: "group" is this one; "l1" takes each γ by itself; "prox" has a proximal step in
    place of the subgradient, which makes γ exactly zero; "polar" polarizes them
    (`slimming.training.penalties`). ``inputs`` are as in `slimming.prune`. ``schedule``:
    "constant", "linear" (down to a tenth), or "half" (none in the second half) of ``steps`` calls
    of `after_step`. ``ignore`` and ``only`` name layers as in `slimming.prune`. Parameters without
    a gradient are skipped; under DistributedDataParallel gradients are those of all processes, and
    ``model`` may be wrapped.
    UserError if nothing can be pruned, or an argument is invalid.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    >>> sparsity = Sparsity(net, torch.rand(2, 3, 8, 8), s=0.5)
    >>> net[1].weight.grad = torch.zeros(4)
    >>> sparsity.on_gradients()
    >>> net[1].weight.grad
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    name = "sparsity"  # as a callback of `slimming.training`

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        s: float = 1e-4,
        *,
        penalty: str = "group",
        schedule: str = "constant",
        steps: int | None = None,
        ignore: Iterable[str] = (),
        only: Iterable[str] | None = None,
    ):
        given: Any = s
        if not isinstance(given, numbers.Real) or not s >= 0:
            raise UserError(f"s must be a number of at least 0, not {s!r}")
        if penalty not in PENALTIES:
            raise UserError(f"penalty must be {', '.join(PENALTIES)}, not {penalty!r}")
        if schedule not in SCHEDULES:
            raise UserError(f"schedule must be {', '.join(SCHEDULES)}, not {schedule!r}")
        if schedule != "constant" and not steps:
            raise UserError(f"schedule {schedule!r} needs the number of `steps` of the training")
        self.s, self.kind, self.schedule, self.steps, self.step = s, penalty, schedule, steps, 0
        self.ignore = [ignore] if isinstance(ignore, str) else list(ignore)
        self.only = [only] if isinstance(only, str) else only and list(only)
        self.inputs = sample(bare(model), inputs)
        self.on_replace(model)

    def on_replace(self, model: nn.Module) -> None:
        """Continue with another network, such as one that was slimmed: it is traced again."""
        self.groups = some(prunable(bare(model), self.inputs, self.ignore, self.only))
        self.index(bare(model))

    def of(self, model: nn.Module) -> Sparsity:
        """The same for another network of the same layers, such as the average (EMA) of this one:
        its `near_zero` and `summary` are of what is evaluated and saved."""
        other = copy.copy(self)
        other.index(bare(getattr(model, "ema", model)))
        return other

    def index(self, model: nn.Module) -> None:
        """Find the unit of each γ of ``model``; 0 for those that cannot go."""
        self.model = model
        norms = scaled_norms(model)
        units = {n: torch.zeros(len(norm.weight), dtype=torch.long) for n, norm in norms.items()}
        count, self.by_weights = 1, []
        for group in self.groups:
            scaled = [m for m in group.members if m.layer in norms and m.side in ("out", "mask")]
            for member in scaled:
                units[member.layer][member.channels] = member.units + count
            if not scaled:
                self.by_weights.append(group)
            count += group.size
        self.norms = {name: norms[name] for name, own in units.items() if own.any()}
        found = torch.cat([torch.zeros(0, dtype=torch.long), *(units[n] for n in self.norms)])
        if self.kind != "group":
            found = torch.where(found > 0, torch.arange(1, len(found) + 1), 0)  # each by itself
        self.factors = Factors(self.norms.values(), found)
        self.penalty = PENALTIES[self.kind](self.factors, self.s)

    def attach(self, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        """Let each step of ``optimizer`` call `on_gradients` and `after_step`, where a loop that is
        not yours makes the steps: a trainer of Ultralytics, Lightning, Transformers. Gradients are
        unscaled and clipped by then. ``remove()`` of the handles ends it."""

        def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
            scale = getattr(optimizer, "grad_scale", None)  # a fused one unscales in its step
            self.on_gradients(scale=1.0 if scale is None else float(scale))

        def after(optimizer: torch.optim.Optimizer, *_: object) -> None:
            self.after_step(optimizer)

        return [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    @property
    def now(self) -> float:
        """The strength of the penalty in this step: ``s`` by its schedule."""
        return self.s * SCHEDULES[self.schedule](self.step / self.steps if self.steps else 0.0)

    @torch.no_grad()
    def on_gradients(self, batch: object = None, *, scale: float = 1.0) -> None:
        """Add the subgradient of the penalty to the gradients. Call it between backward and step,
        when gradients are final: accumulated, averaged over processes, and unscaled, or ``scale``
        times as large."""
        self.penalty.s = self.now
        if not self.penalty.s:
            return
        if self.norms and hasattr(self.penalty, "on_gradients"):
            self.penalty.on_gradients(scale=scale)
        for group in self.by_weights:
            _of_weights(self.model, group, self.penalty.s * scale)

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count a step, for the schedule. "prox" and "polar" act here; "prox" needs the
        ``optimizer`` that has made the step."""
        self.penalty.s = self.now
        if self.norms and self.penalty.s and hasattr(self.penalty, "after_step"):
            self.penalty.after_step(optimizer)
        self.step += 1

    def near_zero(self, limit: float = NEAR_ZERO) -> dict[str, float]:
        """By BatchNorm: the fraction of its γ that can go for which |γ| < ``limit``."""
        can_go = self.factors.split(self.factors.acts.cpu())
        small = [norm.weight.detach().abs().cpu() < limit for norm in self.norms.values()]
        both = zip(self.norms, small, can_go, strict=True)
        return {name: float(near[own].float().mean()) for name, near, own in both}

    def summary(self) -> str:
        """The fraction of γ near zero in each layer, and what pruning would leave: parameters and
        FLOPs, not proved."""
        header = ["layer", "channels", f"|γ| < {NEAR_ZERO}", "|γ|: 10, 50, 90 %"]
        rows = []
        for name, share in self.near_zero().items():
            norm = self.norms[name]
            rows.append([name, f"{len(norm.weight):,}", f"{share:.1%}", _quantiles(norm)])
        return "\n".join([*([table(header, rows)] if rows else []), *self._costs()])

    def _costs(self) -> list[str]:
        measure = "lamp" if self.by_weights else "bn"
        model = copied(self.model).eval()
        scores = MEASURES[measure](Evidence(model, []))
        full = figures.count_with(model, self.inputs)
        lines = []
        for ratio in RATIOS:
            choice = ranking.choose(self.groups, scores, ratio, least=LEAST)
            left = figures.count_with(slim_to(model, self.groups, choice.kept)[0], self.inputs)
            parameters, flops = left.parameters / full.parameters, left.flops / full.flops
            told = f", |γ| up to {choice.threshold:.3g} go" if measure == "bn" else ""
            lines.append(
                f"pruned by {ratio:.0%} ({measure}): {parameters:.1%} of the parameters and "
                f"{flops:.1%} of the FLOPs are left{told}"
            )
        return lines

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: the number of steps."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.step = int(state["step"])


def bare(model: nn.Module) -> nn.Module:
    """The network in DataParallel, DistributedDataParallel, AveragedModel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        wrapped = isinstance(
            model,
            nn.DataParallel
            | nn.parallel.DistributedDataParallel
            | torch.optim.swa_utils.AveragedModel,
        )
        inner = model.module if wrapped else inner
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _quantiles(norm: BatchNorm) -> str:
    gamma = norm.weight.detach().float().abs().cpu()
    found = gamma.quantile(torch.tensor([0.1, 0.5, 0.9]))
    return "  ".join(f"{value:.3g}" for value in found.tolist())


def _of_weights(model: nn.Module, group: Group, s: float) -> None:
    """Add s · w / ‖w_u‖ to the gradients of the weights of the units of a group."""
    parts = []
    for member in group.members:
        kind = kind_of(model.get_submodule(member.layer)) if member.side in ("out", "in") else None
        if kind is None:
            continue
        layer = model.get_submodule(member.layer)
        if member.side == "in" and isinstance(layer, Convolution) and layer.groups > 1:
            continue  # those of one group of many
        for part, dim in (kind.out if member.side == "out" else kind.into).items():
            weight = getattr(layer, part, None)
            if isinstance(weight, nn.Parameter) and weight.dim() > 1:
                parts.append((weight, dim, member))
    if not parts:
        return
    device = parts[0][0].device
    squares = torch.zeros(group.size, device=device)
    for weight, dim, member in parts:
        rows = weight.detach().movedim(dim, 0).flatten(1).float().square().sum(1)
        squares.index_add_(0, member.units.to(device), rows[member.channels.to(device)])
    share = squares.sqrt_().clamp_min_(torch.finfo(torch.float32).tiny).reciprocal_()
    for weight, dim, member in parts:
        if weight.requires_grad and weight.grad is not None:
            factor = torch.zeros(weight.shape[dim], device=device)
            factor[member.channels.to(device)] = share[member.units.to(device)]
            shape = [-1 if d == dim else 1 for d in range(weight.dim())]
            weight.grad.add_((weight.detach() * factor.view(shape)).to(weight.grad.dtype), alpha=s)


def sliced_state(dense: nn.Module, kept: Kept, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict of ``optimizer``, which trained ``dense``, for one of the slim network."""
    names = {id(parameter): name for name, parameter in dense.named_parameters()}
    saved = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [p for p in parameters if id(p) not in names]
    if strangers:
        raise UserError("the optimizer has parameters that are not of the dense network")
    state = {number: dict(saved["state"].get(number, {})) for number in range(len(parameters))}
    whole: dict[str, dict[str, torch.Tensor]] = {}  # what has a number for each weight, by its key
    for number, parameter in enumerate(parameters):
        for key, value in state[number].items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                whole.setdefault(key, {})[names[id(parameter)]] = value
            elif getattr(value, "shape", ()) or not isinstance(
                value, torch.Tensor | int | float | bool | None
            ):
                raise UserError(
                    f"{key} of {type(optimizer).__name__} is not one number for each weight: start "
                    "with a new optimizer"
                )
    for key, values in whole.items():
        sliced = slice_tensors(dense, values, kept)
        for number, parameter in enumerate(parameters):
            if (name := names[id(parameter)]) in sliced:
                state[number][key] = sliced[name].clone()
    return {"state": state, "param_groups": saved["param_groups"]}


def distill(
    slim: nn.Module, dense: nn.Module, temperature: float = 1.0
) -> Callable[..., torch.Tensor]:
    """A loss to add in fine-tuning: how far the outputs of ``slim`` are from those of ``dense``, as
    a function of the inputs and, if they are there already, the outputs of ``slim`` for them.

    For logits (N, classes) it is the divergence KL(dense ‖ slim) of the predictions at
    ``temperature`` T, times T² (Hinton et al., 1503.02531); for other outputs, in any structure,
    the mean of the squared error relative to the mean square of each tensor. ``dense`` runs
    without gradients, in the mode of ``slim``, which may decide what is returned, with BatchNorm
    and dropout in eval mode; afterwards it is in its mode of before.

    >>> net = nn.Linear(4, 3)
    >>> inputs = torch.rand(2, 4)
    >>> float(distill(net, net)(inputs).detach().abs()) < 1e-6
    True
    """
    if not temperature > 0:
        raise UserError(f"temperature must be positive, not {temperature}")
    slim, teacher = arguments.network(slim), bare(arguments.network(dense))
    still = [m for m in teacher.modules() if isinstance(m, STILL)]

    def loss(inputs: Inputs, outputs: Any = None) -> torch.Tensor:
        outputs = arguments.call(slim, inputs) if outputs is None else outputs
        with arguments.modes_kept(teacher), torch.no_grad():
            teacher.train(slim.training)
            for module in still:
                module.eval()
            theirs = arguments.tensors(arguments.call(teacher, inputs))
        ours = arguments.tensors(outputs)
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            raise UserError(
                "the networks return tensors of other shapes: pass the outputs of the slim network"
            )
        if isinstance(outputs, torch.Tensor) and outputs.dim() == 2:
            logs, theirs_logs = ((t / temperature).log_softmax(1) for t in (ours[0], theirs[0]))
            kl = F.kl_div(logs, theirs_logs, reduction="batchmean", log_target=True)
            return kl * temperature**2
        if temperature != 1:
            raise UserError("`temperature` is for networks that return logits (N, classes)")
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
        tiny = torch.finfo(torch.float32).tiny
        errors = [(a - b).square().mean() / b.square().mean().clamp_min(tiny) for a, b in pairs]
        return torch.stack(errors).mean()

    return loss
