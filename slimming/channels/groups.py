"""Groups of coupled channels: what a trace on labels found, as layers and their channels."""

import contextlib
import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from slimming.channels import inputs as arguments
from slimming.channels.inputs import Inputs
from slimming.channels.kinds import (
    OPAQUE,
    Convolution,
    Opaque,
    is_depthwise,
    is_selection,
    kind_of,
    select,
)
from slimming.channels.labels import OUTPUT, Axis, Split, Trace, compact, components, pairs, varied
from slimming.channels.operations import EVERY
from slimming.channels.scaling import batch_norms, selections
from slimming.errors import UserError, raise_if_of_the_machine
from slimming.progress import told

NONE = torch.empty(0, 2, dtype=torch.long)


@dataclass(frozen=True)
class Member:
    """The channels of a layer in a group: channel ``channels[j]`` belongs to unit ``units[j]``.

    ``side``: 'out', the layer writes these channels; 'in', it reads them; 'mask', a selection drops
    them (see `Group`); 'dim D', positions of the parameter called ``layer`` along a dimension, and
    'in D', along which channels are read; 'size S', the number S in the attributes of the module
    ``layer`` is their number.
    """

    layer: str
    side: str
    channels: torch.Tensor
    units: torch.Tensor
    width: int  # of this side of the dense layer


@dataclass(frozen=True)
class Group:
    """Units of coupled channels: the channels of a unit are removed together, in all its layers.

    Layers that write a unit (side 'out') lose their filter for it, layers that read it ('in') lose
    its slice of every filter. A BN before a channel selection ('mask') keeps its width, as do the
    layers that write to it: the selection drops the unit.

    ``filters`` (size,) int: the number of rows of convolutions and linear layers in each unit; 1 if
    no layer writes it. ``alive`` (size,) bool: False if a selection has dropped the unit already;
    such a unit counts 0 filters and stays dropped.
    """

    name: str
    members: list[Member] = field(repr=False)
    filters: torch.Tensor = field(repr=False)
    alive: torch.Tensor = field(repr=False)

    @property
    def size(self) -> int:
        """The number of units."""
        return len(self.filters)


@dataclass(frozen=True)
class Channels:
    """The coupled channels of a network: ``groups`` that can be pruned, in the order of its
    modules; ``pinned``: for each reason, in words, the names of the layers whose channels stay
    because of it; ``unseen``: the layers that did not run; ``inputs``: what it was traced on, the
    least that the network takes: one small sample, one, or all."""

    groups: list[Group]
    pinned: dict[str, list[str]]
    unseen: list[str]
    inputs: Inputs = field(repr=False)


def traced(model: nn.Module, inputs: Inputs) -> tuple[Trace, Inputs]:
    """The labels of a copy of ``model``, on the CPU in eval mode, for the least of ``inputs`` that
    it takes, and these. UserError with the reason if the model itself fails."""
    network = with_selections(model).cpu().float().eval()
    one = arguments.like(arguments.first(inputs, 1), "cpu", torch.float32)
    whole = arguments.like(inputs, "cpu", torch.float32)
    for attempt in [arguments.smaller(one), one, whole]:
        if attempt is None:
            continue
        trace = Trace(network, EVERY)
        try:
            outputs = _run(network, attempt, trace)
        except Exception as error:  # whatever the user's forward does
            raise_if_of_the_machine(error)
            failure = error
            continue
        if not arguments.tensors(outputs):
            raise UserError(
                f"{type(model).__name__} returns no tensors but a {type(outputs).__name__}: return "
                "tensors, so that a slim network can be compared with it"
            )
        if _unseen(trace):  # auxiliary heads; BatchNorm trains on two samples
            twice = arguments.mapped(attempt, lambda t: torch.cat([t, t]) if t.dim() else t)
            with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
                _run(network.train(), twice, trace)
        return trace, attempt
    reason = " ".join(str(failure).split())[:300]
    raise UserError(
        f"{type(model).__name__} fails on these inputs ({type(failure).__name__}: {reason}): pass "
        "inputs that it takes: a tensor, a tuple of arguments, or a dict of keyword arguments"
    ) from failure


def _run(network: nn.Module, inputs: Inputs, trace: Trace) -> Any:
    """Run a network on labels; what it returns stays."""
    trace.stack.clear()
    with arguments.alone(), hooked(network, trace), trace:
        outputs = arguments.call(network, inputs)
    for tensor in arguments.tensors(outputs):
        trace.pin(trace.of(tensor), OUTPUT)
    return outputs


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps tensors of a graph: weights that a hook recomputes,
    activations of its last run."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            elif type(value) in (dict, OrderedDict) and not value:
                memo[id(value)] = value.copy()  # a dozen in each module: deepcopy takes longer
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def hooked(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Tell ``trace`` which module runs, and follow as a whole those that have a rule."""
    handles = []
    for name, module in model.named_modules():
        rule = next((r for kinds, r in OPAQUE.items() if isinstance(module, kinds)), None)
        rule = select if is_selection(module) else rule
        handles += [
            module.register_forward_pre_hook(partial(_enter, trace, name, rule)),
            module.register_forward_hook(
                partial(_leave, trace, rule), with_kwargs=True, always_call=True
            ),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(trace: Trace, name: str, rule: Opaque | None, module: nn.Module, args: Any) -> None:
    trace.stack.append(name)
    trace.ran[name] = None
    trace.muted += rule is not None


@torch.no_grad()
def _leave(
    trace: Trace, rule: Opaque | None, module: nn.Module, args: Any, kwargs: Any, out: Any
) -> None:
    if rule is not None:
        if trace.muted == 1:  # not inside another one
            rule(trace, module, [*args, *kwargs.values()], out)
        trace.muted -= 1
    trace.stack.pop()


class Found:
    """What a trace found, in units: numbers of the components of its labels."""

    def __init__(self, model: nn.Module, trace: Trace):
        self.model, self.trace = model, trace
        self.units = components(trace.count, torch.cat([*trace.pairs, NONE]))
        self.axes = dict(trace.axes)
        self.norms = {name: norm for norm, name in selections(trace.model).items()}
        self.present = {self.norms.get(n, n): present for n, (_, present) in trace.gates.items()}
        for name, labels in trace.elements.items():
            self._place(name, labels)
        for split in trace.splits:
            self._settle(split)

    def of(self, labels: torch.Tensor) -> torch.Tensor:
        """The unit of each label."""
        return self.units[labels.long()]

    def join(self, together: torch.Tensor) -> None:
        self.units = components(len(self.units), together)[self.units]

    def _place(self, name: str, labels: torch.Tensor) -> None:
        """Find the dimension of a parameter along which its units vary; pin it if there are more,
        or if a layer reads it as its weight, too."""
        known = [axis for axis in self.trace.axes if axis.name == name]
        rows = labels.dim() > 2 and Axis(name, 0) in known
        units = compact(self.of(labels).double())
        dims = [0] if rows else varied(units) or [labels.dim() - 1]
        if len(dims) > 1 or any(axis.dim != dims[0] for axis in known):
            self.trace.pin(labels, f"{name} is used outside of a layer")
            for axis in known:
                self.trace.pin(self.trace.axes[axis], f"{name} is used outside of a layer")
            return
        if not rows:
            first = labels.movedim(dims[0], 0).flatten(1)[:, 0] if labels.dim() > 1 else labels
            self.axes[Axis(name, dims[0])] = first

    def _settle(self, split: Split) -> None:
        """Of the two ways to prune a dimension that becomes several, take the one that the code
        leaves open, or else the one that leaves more units: all parts lose equal positions, or
        whole parts go."""
        units = self.of(split.labels)
        pins = [labels for found in self.trace.pins.values() for labels in found]
        pinned = self.of(torch.cat([NONE[:, 0], *pins]))
        if torch.isin(units, pinned).all():
            return
        ways = []
        fixed = [d for d in split.dims if d != split.flexible]
        for dims in [fixed] if split.flexible is not None else [split.dims[:-1], split.dims[-1:]]:
            joined = components(len(self.units), torch.cat([_along(units, dim) for dim in dims]))
            ways.append((len(joined[units].unique()), joined))
        self.units = max(ways, key=lambda way: way[0])[1][self.units]

    def pinned(self) -> dict[str, torch.Tensor]:
        """The units that stay, by the reason."""
        reasons: dict[str, torch.Tensor] = {}
        for (module, why), found in self.trace.pins.items():
            reason = f"{why} in {module}" if module and why != OUTPUT else why
            units = self.of(torch.cat(found)).unique()
            reasons[reason] = torch.cat([reasons.get(reason, units), units]).unique()
        return reasons


def _along(units: torch.Tensor, dim: int) -> torch.Tensor:
    """Pairs (n, 2) of each unit and the first one along a dimension."""
    first = units.narrow(dim, 0, 1).expand_as(units)
    return pairs(units, first)


Side = tuple[str, str]  # the name of a layer, and the side of a `Member`


def sides_of(found: Found) -> dict[Side, torch.Tensor]:
    """The unit of each channel on each side of each layer, in the order of the modules."""
    sides: dict[Side, torch.Tensor] = {}
    modules = found.trace.modules
    for axis, labels in found.axes.items():
        name, _, part = axis.name.rpartition(".")
        layer = modules[name]
        kind, units = kind_of(layer), found.of(labels)
        groups = getattr(layer, "groups", 1) if isinstance(layer, Convolution) else 1
        if kind and kind.out.get(part) == axis.dim:
            whole = part == "weight" and axis.dim == 1 and isinstance(layer, Convolution)
            sides.setdefault((name, "out"), units.repeat(groups) if whole else units)
        elif kind and kind.into.get(part) == axis.dim:
            sides.setdefault((name, "in"), units.repeat(groups) if axis.dim == 1 else units)
        else:
            word = "in" if axis in found.trace.reads else "dim"
            sides[axis.name, f"{word} {axis.dim}"] = units
    for name, (labels, _) in found.trace.gates.items():
        sides[found.norms.get(name, name), "mask"] = found.of(labels)
    for name, count, labels in found.trace.sizes:
        if holds(modules[name], count):
            sides.setdefault((name, f"size {count}"), found.of(labels))
    order = {name: place for place, name in enumerate(modules)}
    places = {side: order.get(side[0], order[side[0].rpartition(".")[0]]) for side in sides if side}
    return dict(sorted(sides.items(), key=lambda item: places[item[0]]))


def holds(module: nn.Module, count: int) -> bool:
    """Whether the code of a module, of none of the kinds, may read ``count`` in an attribute."""
    kind = kind_of(module)
    if kind and any(getattr(module, part, None) is not None for part in kind.out):
        return False
    return any(count in _numbers(value) for value in vars(module).values())


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if type(v) is int]


def _grouped(
    model: nn.Module, found: Found, ignore: list[str], only: list[str] | None
) -> tuple[list[Group], dict[str, list[str]], list[str]]:
    for name, count, labels in found.trace.sizes:  # one number, one set of channels
        same = [other for n, c, other in found.trace.sizes if (n, c) == (name, count)]
        if same[0] is not labels and holds(found.trace.modules[name], count):
            found.join(torch.stack([found.of(same[0]), found.of(labels)], 1))
    sides, reasons = sides_of(found), found.pinned()
    free = torch.ones(len(found.units), dtype=torch.bool)
    free[0] = False
    for units in reasons.values():
        free[units] = False
    writers = {s: u for s, u in sides.items() if _writes(found.trace.modules, s)}
    linked = [_linked(units[free[units]]) for units in writers.values()]
    owned = torch.zeros_like(free)
    for units in writers.values():
        owned[units] = True
    others = {s: u for s, u in sides.items() if s not in writers and s[1] != "in"}
    linked += [_linked(units[free[units] & ~owned[units]]) for units in others.values()]
    group_of = components(len(free), torch.cat([*linked, NONE]))
    roots = dict.fromkeys(
        int(root)
        for units in (*writers.values(), *others.values())
        for root in group_of[units[free[units]]].unique()
    )
    touching: dict[int, dict[Side, torch.Tensor]] = {root: {} for root in roots}
    for side, units in sides.items():
        for root in group_of[units[free[units]]].unique().tolist():
            if root in touching:
                touching[root][side] = units
    number = torch.full((len(free),), -1)
    built = [
        _group(model, found, own, writers, free & (group_of == root), number)
        for root, own in touching.items()
    ]
    order = {name: place for place, name in enumerate(found.trace.modules)}
    built.sort(key=lambda g: min(_place(order, member.layer) for member in g.members))
    whole = selections(found.trace.model)
    kept = [g for g in built if not _ignored(g, ignore, whole) and not _others(g, writers, only)]
    pinned: dict[str, list[str]] = {}
    for reason, units in reasons.items():
        stays = torch.zeros_like(free)
        stays[units] = True
        pinned[reason] = [layer for (layer, _), own in writers.items() if stays[own].any()]
    for group in built:
        foreign = _others(group, writers, only)
        if _ignored(group, ignore, whole):
            pinned.setdefault("ignored", []).append(group.name)
        elif foreign and len(foreign) < len(_makers(group, writers)):
            reason = f"coupled with {foreign[0]}, which `only` does not name"
            pinned.setdefault(reason, []).append(group.name)
    return kept, {reason: names for reason, names in pinned.items() if names}, _unseen(found.trace)


def _unseen(trace: Trace) -> list[str]:
    """The layers that did not run, none of whose tensors was used."""
    used = {name.rpartition(".")[0] for name in (*trace.elements, *(a.name for a in trace.axes))}
    whole = [n for n in trace.ran if isinstance(trace.modules[n], tuple(_flat(OPAQUE)))]
    return [
        name
        for name, layer in trace.modules.items()
        if kind_of(layer)
        and name not in used
        and name not in trace.ran
        and not any(inside(name, other) for other in whole)
    ]


def _flat(kinds: Iterable[type | tuple[type, ...]]) -> Iterator[type]:
    for kind in kinds:
        yield from kind if isinstance(kind, tuple) else (kind,)


def _place(order: dict[str, int], name: str) -> int:
    return order[name] if name in order else order[name.rpartition(".")[0]]


def _writes(modules: dict[str, nn.Module], side: Side) -> bool:
    """Whether a layer makes the channels on this side: those of one layer are of one group."""
    if side[1] == "mask":
        return True
    layer = modules.get(side[0])
    made = isinstance(layer, Convolution | nn.Linear) and not is_depthwise(layer)
    return made and side[1] == "out"


def _linked(units: torch.Tensor) -> torch.Tensor:
    """Pairs (n, 2) that put these units into one group."""
    units = units.unique()
    return torch.stack([units, units[:1].expand_as(units)], 1)


def _group(
    model: nn.Module,
    found: Found,
    own: dict[Side, torch.Tensor],
    writers: dict[Side, torch.Tensor],
    inside: torch.Tensor,
    number: torch.Tensor,
) -> Group:
    """The group of the units ``inside``, in the order in which layers write them."""
    ordered = [u for s, u in own.items() if s in writers] or list(own.values())
    first: dict[int, int] = {}
    for units in ordered:
        for unit in units[inside[units]].tolist():
            first.setdefault(unit, len(first))
    number[list(first)] = torch.arange(len(first))
    members = []
    filters = torch.zeros(len(first), dtype=torch.long)
    alive = torch.ones(len(first), dtype=torch.bool)
    for (name, side), units in own.items():
        places = inside[units].nonzero().flatten()
        numbers = number[units[places]]
        if side == "mask":
            present = found.present[name]
            alive[numbers] = present[places]
            filters[numbers] = present[places].long()
        elif side == "out" and isinstance(found.trace.modules[name], Convolution | nn.Linear):
            filters += torch.bincount(numbers, minlength=len(first))
        members.append(Member(name, side, places, numbers, len(units)))
    leading = next((m for m in members if (m.layer, m.side) in writers), members[0])
    members.sort(key=lambda member: member is not leading)
    return Group(_called(model, members), members, filters.clamp(min=0), alive)


def _called(model: nn.Module, members: list[Member]) -> str:
    """The name of a group: its first layer, or its BN where the network lists a width for each."""
    if not lists_widths(model):
        return members[0].layer
    norms = [m.layer for m in members if isinstance(model.get_submodule(m.layer), nn.BatchNorm2d)]
    return norms[0] if norms else members[0].layer


def with_selections(model: nn.Module) -> nn.Module:
    """A copy of a network; one of the mask implementation becomes its ``slim_form``, which has a
    channel selection behind each BN that keeps its width."""
    build = getattr(model, "slim_form", None)
    if build is None:
        return copied(model)
    assert isinstance(model.cfg, list)
    options = getattr(model, "options", {})
    form = build(depth=model.depth, cfg=model.cfg, num_classes=model.num_classes, **options)
    form.load_state_dict({**form.state_dict(), **model.state_dict()})
    return form.to(next(model.parameters()).device).train(model.training)


def lists_widths(model: object) -> bool:
    """Whether the ``cfg`` of a network lists the kept channels of each BN, as the paper's do."""
    return bool(getattr(model, "cfg_per_norm", False))


def _ignored(group: Group, words: list[str], whole: Mapping[str, str]) -> bool:
    written = [m.layer for m in group.members if m.side in ("out", "mask")]
    written += [whole[m.layer] for m in group.members if m.side == "mask" and m.layer in whole]
    return any(inside(layer, word) for layer in written for word in words)


def _makers(group: Group, writers: Iterable[Side]) -> list[str]:
    """The layers that make the channels of a group, or all of them if none does."""
    made = [m.layer for m in group.members if (m.layer, m.side) in writers]
    return made or [m.layer for m in group.members]


def _others(group: Group, writers: Iterable[Side], only: list[str] | None) -> list[str]:
    """The layers that make the channels of a group and are not in ``only``."""
    if only is None:
        return []
    makers = _makers(group, writers)
    return [layer for layer in makers if not any(inside(layer, word) for word in only)]


def channels(
    model: nn.Module,
    inputs: Inputs,
    ignore: Iterable[str] = (),
    only: Iterable[str] | None = None,
) -> Channels:
    """The coupled channels of ``model``, found by one run on ``inputs``: a tensor, a tuple of
    arguments or a dict of keyword arguments.

    Groups that a layer in ``ignore`` writes (names of layers, or of modules that contain them) are
    left out, with ``only`` also those that another layer writes, and so is what writes the outputs.
    UserError if the model fails, or for an unknown name in ``ignore`` or ``only``.
    """
    check_names(model, [*ignore, *(only or ())])
    if callable(getattr(model, "wiring", None)):
        warnings.warn(
            f"{type(model).__name__}.wiring() is no longer needed, and is not read: what a network "
            "does is seen in a run",
            stacklevel=4,
        )
    with told(f"following what {type(model).__name__} does to its channels"):
        trace, least = traced(model, inputs)
    own = None if only is None else list(only)
    return Channels(*_grouped(model, Found(model, trace), list(ignore), own), least)


def check_names(model: nn.Module, names: Iterable[str]) -> None:
    """UserError if one of ``names`` is not that of a module of ``model``."""
    known = [name for name, _ in model.named_modules()]
    missing = [w for w in names if not w or not any(inside(name, w) for name in known)]
    if missing:
        raise UserError(f"the network has no layer called {', '.join(missing)}")


def inside(name: str, word: str) -> bool:
    """Whether the layer ``name`` is ``word`` or is inside a module of that name."""
    return name == word or name.startswith(f"{word}.")


def count_filters(coupled: Iterable[Group]) -> int:
    """The number of filters that can be removed."""
    return sum(int(group.filters.sum()) for group in coupled)


class Wire(NamedTuple):
    """A convolution or linear layer, the BN whose channels it reads, and the BN directly behind it;
    None if there is no such BN."""

    layer: str
    reads: str | None
    writes: str | None


def wires(model: nn.Module) -> list[Wire]:
    """The layers of one of the paper's networks that read or write a BN, in the order of its
    modules. A BN before a channel selection is written by none."""
    found = Found(model, traced(model, torch.zeros(1, 3, 32, 32))[0])
    form = found.trace.model
    units, gated = sides_of(found), selections(form)
    norms = {name: units[name, "out"] for name in batch_norms(form) if name not in gated}
    gates = {name: units[name, "mask"] for name in gated}

    def reads(own: torch.Tensor) -> str | None:
        behind = (name for name, gate in gates.items() if torch.isin(own, gate).all())
        return next(behind, None) or writes(own)

    def writes(own: torch.Tensor) -> str | None:
        return next((name for name, norm in norms.items() if torch.equal(own, norm)), None)

    layers = [n for n, m in form.named_modules() if isinstance(m, Convolution | nn.Linear)]
    every = [Wire(n, reads(units[n, "in"]), writes(units[n, "out"])) for n in layers]
    return [wire for wire in every if wire.reads or wire.writes]


def behind_selections(model: nn.Module) -> list[str]:
    """The layers that read through a channel selection."""
    gated = selections(with_selections(model))
    return [wire.layer for wire in wires(model) if wire.reads in gated] if gated else []


def declared(model: nn.Module, ignore: Iterable[str] = ()) -> list[Group]:
    """The groups of one of the paper's networks, which all read 3x32x32 images."""
    assert lists_widths(model), "not one of the paper's networks: pass inputs to `groups`"
    return channels(model, torch.zeros(1, 3, 32, 32), ignore).groups
