"""The public API: sparsity training; inspect a network, slim it, repair it, save it, load it,
deploy it."""

import numbers
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from slimming import slicing
from slimming.channels import inputs as arguments
from slimming.channels.groups import Group, channels, copied, count_filters
from slimming.channels.inputs import Inputs
from slimming.channels.kinds import kind_of
from slimming.channels.widths import fit_to, width
from slimming.choosing import budget, importance, ranking
from slimming.choosing.importance import Evidence, Scores
from slimming.choosing.threshold import LEAST, Choice
from slimming.deploy.fold import deploy
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.measuring import figures
from slimming.measuring.figures import Figures
from slimming.repair import layer_by_layer as repairing
from slimming.reports.inspection import Inspection, inspection
from slimming.reports.tables import table
from slimming.slicing.proof import liveness, liveness_warning
from slimming.sparsity import sliced_state
from slimming.storage import checkpoint
from slimming.training.penalties import L1Penalty, updateBN

__all__ = [
    "Inspection",
    "L1Penalty",
    "Slim",
    "compare",
    "deploy",
    "inspect",
    "load",
    "load_into",
    "optimizer_state",
    "prune",
    "repair",
    "rounds",
    "save",
    "updateBN",
]
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
PROBES = 64  # images that tell whether a repaired network is alive
SCOPES = ("global", "layer")
RATIO = 0.5  # of the filters, by default
EXPORTED = (".onnx", ".pt2", ".ts", ".xml", ".tflite")
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Slim:
    """A slim network.

    ``model``: of the class, the dtype, the device and the mode of the dense network, with its hooks
    ``cfg``: the widths of its layers (a list for the paper's networks)
    ``figures``: its cost (parameters, FLOPs of one sample, bytes)
    ``difference``: the proof: the largest difference of its outputs from those of the masked dense
        network, in which no layer reads the removed channels, relative to the largest of each
    ``kept``: by the name of a layer of the dense network and a side, one bool for each channel:
        'out' are those that it writes, 'in' those that it reads; 'dim D' are the positions of a
        parameter outside of layers. What is not there is whole
    ``notes``: what `repair` left as it was or discarded, and why
    ``map``: the same as numbers, for what was kept
    ``liveness``: how much its outputs vary from sample to sample, as a fraction of how much those
        of the dense network do: near 0 the proof holds, but the network is constant (None for fewer
        than 2 samples, or if the outputs of the dense network are constant)
    """

    model: nn.Module = field(repr=False)
    cfg: dict | list = field(repr=False)
    figures: Figures
    difference: float
    kept: slicing.Kept = field(repr=False)
    notes: list[str] = field(default_factory=list)
    liveness: float | None = None
    dense: weakref.ref[nn.Module] | None = field(default=None, repr=False, compare=False)

    @property
    def map(self) -> dict[str, dict[str, torch.Tensor]]:
        """Which channel of the dense network each channel of the slim one was: layer -> side ->
        (channels of the slim layer,) int, for what lost some (see ``kept``)."""
        return {
            name: {side: mask.nonzero().flatten() for side, mask in sides.items()}
            for name, sides in self.kept.items()
        }


@arguments.alone(gradients=True)
def inspect(model: nn.Module, inputs: Inputs) -> Inspection:
    """What can be pruned of a network, before anything is: its groups of coupled channels and what
    goes with them, and what stays, with the reason: print it, or see its fields.

    ``inputs`` are as in `prune`. UserError if the network fails on them.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> print(inspect(net, torch.rand(1, 3, 8, 8)))
    group  channels  parameters  FLOPs  written by; read by
    0             8       87.2%  87.5%  0; 3
    <BLANKLINE>
    Sequential: 8 channels that can go, in 1 group
    with one left in each layer, 87.2% of 3,114 parameters and 87.5% of 21,312 FLOPs go
    stays: 3 (the outputs)
    """
    inputs = checked(model, inputs)
    found = slicing.prunable(model, inputs)
    return inspection(model, found, slicing.sample(model, inputs))


@arguments.alone(gradients=True)
def prune(
    model: nn.Module,
    inputs: Inputs,
    ratio: float | None = None,
    *,
    measure: str | Callable[[Evidence], Scores] | Mapping[str, torch.Tensor] = "lamp",
    scope: str = "global",
    loss: Callable[[Any], torch.Tensor] | None = None,
    labels: torch.Tensor | None = None,
    least: float = LEAST,
    round_to: int = 1,
    ignore: str | Iterable[str] = (),
    only: str | Iterable[str] | None = None,
    flops: float | None = None,
    params: float | None = None,
) -> Slim:
    """Remove the fraction ``ratio`` (0 <= ratio < 1, by default 0.5) of the filters of any CNN, or
    as few as keep a budget, and prove the result.

    ``inputs`` are what the network takes: a tensor such as images (N, 3, H, W), a tuple of
    arguments, or a dict of keyword arguments; its outputs may be any tree of tensors. The result is
    proved on them, and a warning is given if its outputs hardly depend on them.

    ``measure`` is one of `slimming.choosing.importance.MEASURES`, a function of `Evidence` that
    returns scores, or these: name of a layer -> (channels,), the higher the more important. Those
    with gradients need ``loss``, a function of the outputs that returns the mean over the samples,
    or ``labels`` (N,) for the cross entropy. In one ranking over the network, scores must be
    comparable between layers: those of lamp are, sums such as l1 are not, and empty layers
    (benchmarks/defaults.py). ``scope`` ranks filters over the whole network ("global") or prunes
    the same fraction of each layer ("layer"). Each layer keeps at least the fraction ``least``
    (0 to 1) of its channels, or 1 - ``ratio`` if that is less, and a multiple of ``round_to``.
    ``ignore`` are layers, or modules, that are not pruned; ``only``: no others are.
    ``flops`` and ``params`` are upper limits instead of a ratio: up to 1 a fraction of those of
    ``model``, else a number, of FLOPs for one sample and of parameters.

    ``model`` is not changed. UserError if nothing can be pruned, or an argument is invalid.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> slim = prune(net, torch.rand(2, 3, 8, 8), ratio=0.5)
    >>> slim.model[0].out_channels, slim.cfg["0"], slim.figures.parameters
    (4, [3, 4], 1562)
    """
    if scope not in SCOPES:
        raise UserError(f"scope must be 'global' or 'layer', not {scope!r}")
    if loss and labels is not None:
        raise UserError("`loss` and `labels` contradict each other: use one of them")
    for name, value in {"ratio": ratio, "flops": flops, "params": params, "least": least}.items():
        if value is not None and not isinstance(value, numbers.Real):
            raise UserError(f"{name} must be a number, not {value!r}")
    if not isinstance(round_to, int) or round_to < 1:
        raise UserError(f"round_to must be an integer of at least 1, not {round_to!r}")
    limits = {name: v for name, v in {"flops": flops, "params": params}.items() if v is not None}
    if limits and ratio is not None:
        raise UserError(f"`ratio` and `{next(iter(limits))}` contradict each other: use one")
    for name, limit in limits.items():
        if not limit > 0:
            raise UserError(f"{name} must be positive, not {limit}")
    inputs = checked(model, inputs)
    found = channels(model, inputs, _names(ignore), None if only is None else _names(only))
    if limits:  # slim networks run while a ratio is searched
        found = slicing.tried(model, found)
    slicing.some(found)
    one = slicing.sample(model, inputs)
    scores = _scores(model, inputs, measure, loss, labels)

    def choose(coupled: list[Group], ratio: float) -> Choice:
        local = scope == "layer"
        return ranking.choose(coupled, scores, ratio, local=local, round_to=round_to, least=least)

    def within(coupled: list[Group]) -> Choice:
        wanted = RATIO if ratio is None else ratio
        if limits:
            wanted = _fitting(model, coupled, choose, limits, one)
        return choose(coupled, wanted)

    slimmed = slicing.chosen(model, found, within, inputs)
    if found.unseen:
        names = ", ".join(found.unseen[:5]) + (", ..." if len(found.unseen) > 5 else "")
        warnings.warn(
            f"layers that these inputs do not reach were left as they are: {names}; if they read "
            "what other layers lost, they fail: pass inputs that reach them",
            stacklevel=3,
        )
    alive = liveness(slimmed.model, model, inputs)
    if dead := liveness_warning(alive, slimmed.kept):
        warnings.warn(dead, stacklevel=3)
    cost = Figures(
        **figures.count_with(slimmed.model, one)._asdict(),
        bytes=figures.count_bytes(slimmed.model),
    )
    return Slim(
        slimmed.model,
        slimmed.cfg,
        cost,
        slimmed.difference,
        slimmed.kept,
        liveness=alive,
        dense=weakref.ref(model),
    )


def rounds(
    model: nn.Module, inputs: Inputs, to: float = 0.5, steps: int = 5, **more: Any
) -> Iterator[Slim]:
    """Slim in rounds, for a loop that trains between them: each network has the same fraction of
    the FLOPs of the one before, the last at most the fraction ``to`` of those of ``model``.

    The next round starts from ``slim.model`` as it is when the loop continues. ``more`` are further
    arguments of `prune`. UserError as there, or for ``to`` or ``steps`` out of range.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> [slim.model[0].out_channels for slim in rounds(net, torch.rand(2, 3, 8, 8), 0.5, steps=2)]
    [5, 4]
    """
    if more.keys() & {"ratio", "flops", "params"}:
        raise UserError("`rounds` prunes to the fraction `to` of the FLOPs: use no other limit")
    if not 0 < to < 1 or steps < 1:
        raise UserError(f"to must be between 0 and 1, and steps at least 1, not {to} and {steps}")
    full = figures.count_with(model, slicing.sample(model, checked(model, inputs))).flops

    def limit(step: int) -> float:
        return max(1.0 + 1e-9, full * to ** (step / steps))  # above 1 it is no fraction

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune(model, inputs, flops=limit(steps), **more)  # what is impossible fails before training

    def each(model: nn.Module) -> Iterator[Slim]:
        for step in range(1, steps + 1):
            slim = prune(model, inputs, flops=limit(step), **more)
            yield slim
            model = slim.model

    return each(model)


def optimizer_state(slim: Slim, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an ``optimizer`` of the dense network, for one of ``slim.model`` with the same
    groups of parameters: momentum and averages of the channels that are left.

        new = torch.optim.SGD(slim.model.parameters(), lr=0.1, momentum=0.9)
        new.load_state_dict(slimming.optimizer_state(slim, optimizer))

    UserError if the dense network is gone, or the optimizer has parameters of others.
    """
    _check_slim(slim)
    dense = slim.dense() if slim.dense else None
    if dense is None:
        raise UserError("the dense network does not exist any more: keep it until here")
    return sliced_state(dense, slim.kept, optimizer)


def _check_slim(slim: object) -> None:
    if not isinstance(slim, Slim):
        raise UserError(f"pass the Slim that `prune` returned, not a {type(slim).__name__}")


def checked(model: nn.Module, inputs: Inputs) -> Inputs:
    """``inputs`` on the device of the network. UserError if it cannot be followed."""
    if isinstance(model, Slim):
        raise UserError("a Slim is what came out: pass its `model`")
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            f"a {type(model).__name__} cannot be pruned: pass the nn.Module that it was made from"
        )
    if hasattr(model, "_orig_mod"):
        raise UserError(
            "a compiled network cannot be followed: pass the one that torch.compile was given, and "
            "compile the slim one"
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer) or tensor.is_meta:
            raise UserError(f"{name} has no values yet: run the network once, or load its weights")
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise UserError(f"{name} has values that are NaN: check whether the training diverged")
    if not arguments.count(inputs):
        raise UserError("inputs must have at least one sample")
    if any(t.is_floating_point() and bool(t.isnan().any()) for t in arguments.tensors(inputs)):
        raise UserError("inputs have values that are NaN: check how they are made")
    device = slicing.where(model)[0]
    return arguments.like(inputs, device)


def _names(words: str | Iterable[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def _scores(
    model: nn.Module,
    inputs: Inputs,
    measure: str | Callable[[Evidence], Scores] | Mapping[str, torch.Tensor],
    loss: Callable[[Any], torch.Tensor] | None,
    labels: torch.Tensor | None,
) -> Scores:
    """The importance of the channels. UserError for what are no scores of this network."""
    if any(tensor.dtype in HALVES for tensor in model.parameters()):
        model = copied(model).float()  # gradients in fp16 are zero or infinite
    device, dtype = slicing.where(model)
    own = arguments.like(inputs, device, dtype)
    labels = None if labels is None else labels.to(device)
    if isinstance(measure, str):
        judge = importance.MEASURES.get(measure)
        if judge is None or measure == "biased_loss_tracked":  # which needs a training run
            names = ", ".join(name for name in importance.MEASURES if name != "biased_loss_tracked")
            raise UserError(f"unknown measure {measure!r}: use {names}")
        temperature = importance.TEMPERATURES.get(measure, 1.0)
        return judge(Evidence(model, [(own, labels)], temperature, loss=loss))
    scores = measure(Evidence(model, [(own, labels)], loss=loss)) if callable(measure) else measure
    if not isinstance(scores, Mapping):
        raise UserError(
            "`measure` must be a name, scores {name of a layer: (channels,)}, or a function that "
            f"returns these, not a {type(scores).__name__}"
        )
    layers = dict(model.named_modules())
    given = {name: torch.as_tensor(values).detach().cpu() for name, values in scores.items()}
    for name, values in given.items():
        layer = layers.get(name.removesuffix(":in"))
        if layer is None:
            raise UserError(f"`measure` has scores for {name}, but the network has no such layer")
        side = "in" if name.endswith(":in") else "out"
        count = width(layer, side) if kind_of(layer) else values.numel()
        if values.shape != (count,):
            raise UserError(
                f"`measure` has scores of shape {tuple(values.shape)} for {name}, which has "
                f"{count} channels"
            )
    return given


def _fitting(
    model: nn.Module,
    coupled: list[Group],
    choose: Callable[[list[Group], float], Choice],
    limits: Mapping[str, float],
    one: Inputs,
) -> float:
    """The smallest ratio at which the slim network keeps the ``limits``."""
    dense = figures.count_with(model, one)
    full = {"flops": dense.flops, "params": dense.parameters}

    def slim(ratio: float) -> nn.Module:
        return slicing.sliced(model, slicing.kept_channels(coupled, choose(coupled, ratio).kept))

    def cost(slim: nn.Module) -> budget.Costs:
        found = {"params": float(figures.count_parameters(slim))}
        if "flops" not in limits:
            return found
        try:
            return {**found, "flops": figures.flops_with(slim, one)[0]}
        except Exception as error:  # the user's forward may raise anything at other widths
            raise_if_of_the_machine(error)
            raise UserError(
                f"a slim network fails ({type(error).__name__}: {error}): its code needs numbers "
                "of channels that `ignore` should keep; `params` or `ratio` may find others"
            ) from error

    absolute = {n: limit * full[n] if limit <= 1 else limit for n, limit in limits.items()}
    return budget.smallest_fit(slim, cost, absolute, count_filters(coupled)).ratio


@arguments.alone()
def compare(
    models: Mapping[str, nn.Module | Slim], inputs: Inputs, **scores: Mapping[str, float]
) -> str:
    """A table of networks by name: parameters, FLOPs of one sample, milliseconds of a forward pass
    of ``inputs`` (median; they take turns; in eval mode, where they are), and ``scores``: by name
    of a column a number for each network that has one.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> images = torch.rand(2, 3, 8, 8)
    >>> print(compare({"dense": net, "slim": prune(net, images)}, images, top1={"slim": 0.5}))
    ... # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
    network  parameters  FLOPs   ms  top1
    -------  ---...
    dense         3,114  21,312  ...
    slim          1,562  10,656  ... 0.5000
    """
    by_name = all(isinstance(values, Mapping) for values in (models, *scores.values()))
    if not by_name or not models:
        raise UserError("networks and scores are by name: {'dense': model}, top1={'dense': 0.9}")
    networks = {name: arguments.network(model) for name, model in models.items()}
    devices = [slicing.where(model)[0] for model in networks.values()]
    with arguments.modes_kept(*networks.values()):
        tasks = [
            partial(arguments.call, model.eval(), arguments.like(inputs, device))
            for model, device in zip(networks.values(), devices, strict=True)
        ]
        seconds = figures.in_turns(tasks, devices[0])
    rows = []
    for (name, model), taken in zip(networks.items(), seconds, strict=True):
        counts = figures.count_with(model, slicing.sample(model, inputs))
        cells = [name, f"{counts.parameters:,}", f"{counts.flops:,}", f"{1e3 * taken:.2f}"]
        own = [column.get(name) for column in scores.values()]
        rows.append([*cells, *("" if value is None else f"{value:.4f}" for value in own)])
    return table(["network", "parameters", "FLOPs", "ms", *scores], rows)


@arguments.alone(gradients=True)
def repair(slim: Slim, dense: nn.Module, inputs: Inputs, seed: int = 0) -> Slim:
    """Fit the weights of a slim network to reproduce the activations of the ``dense`` network that
    it was pruned from, layer by layer: least squares, without labels or gradients.

    ``inputs`` are at least 32, better 2,048, training samples, as the network reads them, on the
    device to use: images (N, 3, H, W), a tuple of arguments or a dict of them. One sample in eight
    is held back to judge the result, by the divergence of predictions, or by the relative error of
    outputs that are no logits. The model keeps its dtype. A repair that does not bring its outputs
    closer to those of the dense network is discarded. That, and layers that cannot be fitted, are
    in ``notes`` of the result and in a warning each. UserError if the network fails on ``inputs``.

    >>> _ = torch.manual_seed(1)  # untrained, it is closer for 19 of 20 seeds
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> images = torch.rand(64, 3, 8, 8)
    >>> slim = prune(net, images, ratio=0.5)
    >>> repaired = repair(slim, net, images)
    >>> errors = [(s.model(images) - net(images)).norm() for s in (slim, repaired)]
    >>> bool(errors[1] < errors[0])
    True
    """
    _check_slim(slim)
    dense = arguments.network(dense)
    layers = dict(dense.named_modules())
    for name, sides in slim.kept.items():
        layer = layers.get(name)
        if layer is None or not kind_of(layer):
            continue
        own = {side: mask for side, mask in sides.items() if side in ("in", "out")}
        if any(width(layer, side) != len(mask) for side, mask in own.items()):
            raise UserError(f"`dense` is not the network that was pruned: {name} differs")
    repaired = repairing.repair(slim.model, dense, slim.kept, inputs, seed)
    notes = repaired.notes if repaired.helped else [*repaired.notes, str(repaired)]
    for note in notes:
        warnings.warn(note, stacklevel=3)
    if not repaired.helped:
        return replace(slim, notes=notes)
    alive = liveness(repaired.model, dense, arguments.first(inputs, PROBES))
    there = repaired.model.to(slicing.where(slim.model)[0])
    return replace(slim, model=there, notes=notes, liveness=alive)


def save(slim: Slim | nn.Module, path: str | Path) -> None:
    """Write a slim network, atomically: its weights, its widths, and the numbers of channels that
    were set in the code of its modules. A path that ends in .safetensors gets that format, which
    other programs read (pip install safetensors); one that ends in .txt only the shapes of the
    weights, in the form of timm's pruned networks, for its ``adapt_model_from_string``.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> path = Path(tempfile.mkdtemp(), "slim.pth")
    >>> save(prune(net, torch.rand(2, 3, 8, 8)), path)
    >>> load(path, build=lambda: net)[0]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    model = arguments.network(slim)
    if isinstance(model, WRAPPERS):
        model = model.module
    if Path(path).suffix in EXPORTED:
        raise UserError(
            f"{path}: `save` writes weights and widths for `load`, not a program: use "
            "torch.onnx.export or torch.export on the network, or export.py"
        )
    contents = {
        "cfg": slicing.cfg_of(model),
        "numbers": slicing.numbers_of(model),
        "buffers": slicing.unsaved_buffers(model),
        "state_dict": model.state_dict(),
    }
    checkpoint.write_slim(path, contents)


def load(path: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Load the slim network from a file of `save` or a checkpoint of the scripts, in eval mode.

    ``build`` returns the dense network; its layers get the widths in the file. Loading runs no code
    from the file. UserError if it is damaged or of another network.

    >>> import tempfile
    >>> def build():
    ...     return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> path = Path(tempfile.mkdtemp(), "slim.pth")
    >>> save(prune(build(), torch.rand(2, 3, 8, 8)), path)
    >>> load(path, build)[0].out_channels
    4
    """
    if isinstance(build, nn.Module):
        raise UserError("`build` is a function that returns the dense network; use `load_into`")
    model = build()
    if not isinstance(model, nn.Module):
        raise UserError(f"`build` must return the dense network, not a {type(model).__name__}")
    return load_into(model, path).eval()


def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """`load` into the dense ``model``, or one of the same widths, however it was made: in place, in
    its mode, on its device, in the dtype of the file; return it. UserError if the file is damaged
    or of another network.
    """
    model = arguments.network(model)
    contents = checkpoint.read_slim(path)
    state = checkpoint.fitted(contents["state_dict"], model)
    own = model.state_dict()
    if others := sorted(own.keys() ^ state.keys()):
        raise UserError(
            f"{path} is of another network: {others[0]} is "
            f"{'missing' if others[0] in own else 'unknown'} ({len(others)} such names)"
        )
    buffers, numbers = checkpoint.widths_of(contents)
    try:
        fit_to(model, {**state, **buffers})
    except ValueError as error:
        raise UserError(f"{path} is not of a slim version of the network: {error}") from error
    slicing.set_numbers(model, numbers)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        saved = state.get(name, buffers.get(name))
        if saved is not None and tensor.dtype != saved.dtype:
            tensor.data = tensor.data.to(saved.dtype)  # the same Parameter: it may be tied
        if name in buffers:
            tensor.data.copy_(buffers[name])
    return slicing.load_slim_state(model, state)
