"""Run a network once on labels instead of numbers.

Beside every tensor stands one of the same shape that holds, element by element, the label of the
channel that it belongs to (0: none). What moves data moves labels; layers with weights make labels
and tie those that they read; what no rule knows pins its labels: those channels stay. Labels that
are equal along a dimension, as over height and width, are stored once (an expanded view).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # the only way to see every operation
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

LABELS = torch.float32  # the type that every operation that moves data supports; exact to 2^24
MOST = 2**20  # elements of one parameter that get labels of their own
MANY = 2**14  # labels that are counted, not sorted
OUTPUT = "the outputs"
RESHAPED_IN_PLACE = {"as_strided", "squeeze", "unsqueeze", "t", "transpose", "swapaxes", "swapdims"}


class Call(NamedTuple):
    """An operation that has run: what it is, its arguments, and what it returned."""

    name: str  # 'add' for aten::add_.Tensor; 'torchvision::roi_align' outside of aten
    func: Any
    args: tuple
    kwargs: dict
    outputs: list[torch.Tensor]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Its arguments that are tensors."""
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, torch.Tensor)]

    def arg(self, place: int, default: Any = None) -> Any:
        """The positional argument at ``place``, if it was given."""
        return self.args[place] if len(self.args) > place else default


Labels = torch.Tensor | None  # None: no element has a label
Rule = Callable[["Trace", Call], "Labels | list[Labels]"]  # the labels of the outputs


class Rules(NamedTuple):
    """What operations do to labels: views, an operation by its rule, one that no rule knows."""

    view: Callable[["Trace", Call], None]
    of: Callable[[Call], Rule]
    unknown: Rule


class Axis(NamedTuple):
    """A dimension of a parameter or buffer."""

    name: str
    dim: int


class Split(NamedTuple):
    """A place where a dimension with labels becomes several: ``labels``, of the parts, in
    ``dims``. Either all parts lose equal positions, or whole parts go. ``flexible``: the dimension
    whose size the code leaves open (-1), which is the one that gets shorter."""

    module: str
    labels: torch.Tensor
    dims: list[int]
    flexible: int | None


class Trace(TorchDispatchMode):
    """The labels of ``model`` while it runs, and what was learned about them.

    ``axes``: the label of each position along a dimension of a parameter or buffer, ``reads``:
    those along which a layer reads its channels; ``elements``: the label of each element of those
    that no layer reads as its weights; ``sizes``: the numbers of channels that the code of a module
    may hold, with their labels; ``splits``; ``gates``: what channel selections pass on, by their
    names, and which channels they keep; ``ran``: the modules that ran. `tie` and `pin` record the
    rest.
    """

    def __init__(self, model: nn.Module, rules: Rules):
        super().__init__()
        self.rules = rules
        self.model = model
        self.count = 1
        self.pairs: list[torch.Tensor] = []
        self.pins: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)  # (module, why)
        self.axes: dict[Axis, torch.Tensor] = {}
        self.reads: set[Axis] = set()
        self.elements: dict[str, torch.Tensor] = {}
        self.sizes: list[tuple[str, int, torch.Tensor]] = []
        self.splits: list[Split] = []
        self.gates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.ran: dict[str, None] = {}
        self.faults: list[str] = []
        self.muted = 0
        self.modules = dict(model.named_modules())
        self.stack: list[str] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() and tensor.numel():
                self.tensors[name] = tensor
                self.names.setdefault(id(tensor), name)
        self._labels = WeakTensorKeyDictionary()
        self._weights = WeakTensorKeyDictionary()  # permuted parameter -> its name, its dimensions
        self._sharing: dict[int, list[Any]] = defaultdict(list)
        self._loose: list[tuple[int, int]] = []  # labels of elements of parameters

    # what rules call

    @property
    def module(self) -> str:
        """The name of the module that is running."""
        return self.stack[-1] if self.stack else ""

    def fresh(self, count: int) -> torch.Tensor:
        """``count`` new labels."""
        self.count += count
        return torch.arange(self.count - count, self.count, dtype=LABELS)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The labels of a tensor, in its shape. A parameter or buffer that has none yet gets one
        for each element, or one for each filter if it is the weight of a convolution."""
        found = self._labels.get(tensor)
        if found is None:
            name = self.name(tensor)
            found = self._of_parameter(name, tensor) if name else torch.zeros((), dtype=LABELS)
        return found.expand(tensor.shape)

    def name(self, tensor: torch.Tensor) -> str | None:
        """The name of a parameter or buffer, or of one with its dimensions permuted."""
        known = self._weights.get(tensor)
        return known[0] if known else self.names.get(id(tensor))

    def dims(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Which dimension of the parameter each dimension of ``tensor`` is."""
        known = self._weights.get(tensor)
        return known[1] if known else tuple(range(tensor.dim()))

    def axis(self, tensor: torch.Tensor, dim: int, reads: bool = False) -> torch.Tensor:
        """A label for each position along a dimension of a parameter: the same at each call.
        ``reads``: a layer reads its channels along this dimension."""
        name = self.name(tensor)
        assert name is not None, "not a parameter"
        axis = Axis(name, self.dims(tensor)[dim])
        if axis not in self.axes:
            self.axes[axis] = self.fresh(tensor.shape[dim])
        if reads:
            self.reads.add(axis)
        return self.axes[axis]

    def tie(self, *labels: torch.Tensor) -> None:
        """What these labels stand for at equal places goes together or stays; a label that meets 0,
        which stays, is pinned."""
        first, *others = torch.broadcast_tensors(*labels)
        for other in others:
            a, b = _distinct(first, other)
            if torch.equal(a, b):
                continue
            meets = (a != 0) & (b != 0)
            self.pin(torch.where(meets, 0, torch.maximum(a, b)), "a constant")
            meets &= a != b
            if meets.any():
                self.pairs.append(pairs(a[meets], b[meets]))

    def pin(self, labels: torch.Tensor, why: str) -> None:
        """The channels with these labels stay."""
        found = _once(labels)
        if len(found):
            self.pins[self.module, why].append(found)

    def along(self, labels: torch.Tensor, dim: int) -> torch.Tensor:
        """One label for each position along ``dim``: all at a position are tied."""
        rows = labels.movedim(dim, 0)
        rows = _squeezed(rows, 1).reshape(len(rows), -1)
        first = rows.amax(1)
        if rows.shape[1] > 1:
            self.tie(torch.where(rows == 0, first[:, None], rows), first[:, None])
        return first

    def reduce(self, labels: torch.Tensor, dims: Iterable[int], why: str) -> None:
        """What is summed over ``dims`` cannot lose a part: pin it where the labels vary. Of a
        parameter they are tied: each filter of a weight is normalised by itself."""
        if not (varied := [d for d in dims if varies(labels, d)]):
            return
        found = _once(labels)
        own = [bool(((found >= a) & (found < b)).any()) for a, b in self._loose]
        inside = sum(int(((found >= a) & (found < b)).sum()) for a, b in self._loose)
        if any(own) and inside == len(found):
            labels = _squeezed(labels)
            first = labels.amax(varied, keepdim=True)
            self.tie(torch.where(labels == 0, first, labels), first)
        else:
            self.pin(labels, why)

    def size(self, count: int, labels: torch.Tensor) -> None:
        """The code of the running module may hold ``count``, the number of these channels."""
        self.sizes.append((self.module, count, labels))

    # the mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.muted:
            return out
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        call = Call(_name(func), func, args, kwargs, outputs)
        known = [t for t in call.tensors if t in self._labels or self.name(t)]
        if not outputs or not known:
            return out
        with torch.no_grad():
            try:
                self._follow(call)
            except Exception as error:  # arguments that a rule does not know
                self.faults.append(f"{call.name}: {type(error).__name__}: {error}")
                self.rules.unknown(self, call)
                for tensor in outputs:
                    self._labels.pop(tensor, None)
        return out

    def _follow(self, call: Call) -> None:
        """Give the outputs of a call their labels."""
        in_place = call.func.name().partition(".")[0].endswith("_")
        if in_place and call.name in RESHAPED_IN_PLACE:
            return self._reshape(call)
        storages = {t.untyped_storage().data_ptr() for t in call.tensors if t.numel()}
        written = {t.untyped_storage().data_ptr() for t in call.outputs if t.numel()}
        if written and written <= storages and not in_place:
            return self.rules.view(self, call)
        labels = self.rules.of(call)(self, call)
        labels = labels if isinstance(labels, list) else [labels] * len(call.outputs)
        if in_place and isinstance(call.args[0], torch.Tensor):
            return self._write(call.args[0], labels[0])
        for tensor, own in zip(call.outputs, labels, strict=True):
            self.put(tensor, own)

    def put(self, tensor: torch.Tensor, labels: Labels) -> None:
        """Give a tensor its labels."""
        if labels is not None:
            if labels.is_complex():
                raise TypeError("two labels in one element")  # which are pinned, then
            labels = compact(labels.expand(tensor.shape))
        if labels is None or not labelled(labels):
            self._labels.pop(tensor, None)
            return
        if tensor not in self._labels:
            self._sharing[tensor.untyped_storage().data_ptr()].append(tensor_ref(tensor))
        self._labels[tensor] = labels

    def weigh(self, tensor: torch.Tensor, name: str, dims: tuple[int, ...]) -> None:
        """``tensor`` is the parameter ``name`` with its dimensions in this order."""
        self._weights[tensor] = (name, dims)

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter, maybe permuted, with more than one dimension."""
        return tensor.dim() > 1 and self.name(tensor) is not None and tensor not in self._labels

    def _reshape(self, call: Call) -> None:
        """Labels of a tensor whose shape was changed in place."""
        tensor, *args = call.args
        before = self._labels.pop(tensor, None)
        if before is None:
            return
        if call.name == "as_strided" and before.shape != tensor.shape:
            self.pin(before, call.name)
        elif call.name == "as_strided":
            self.put(tensor, before)
        else:
            self.put(tensor, getattr(before, call.name)(*args))

    def _of_parameter(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        stored = self.tensors[name]
        own = self.elements.get(name)
        if own is None:
            if stored.dim() > 2 and stored.shape[0] > 1:  # weights, standardised or masked
                rows = self.axis(stored, 0)
                own = rows.view(-1, *[1] * (stored.dim() - 1)).expand(stored.shape)
                self._loose.append((int(rows[0]), int(rows[-1]) + 1))
            elif stored.numel() <= MOST:
                own = self.fresh(stored.numel()).view(stored.shape)
                self._loose.append((int(own.min()), int(own.max()) + 1))
            else:
                own = self.fresh(1).expand(stored.shape)
                self.pin(own, f"the size of {name}")
            self.elements[name] = own
        return own.permute(self.dims(tensor)) if tensor in self._weights else own

    def _write(self, tensor: torch.Tensor, labels: Labels) -> None:
        """Labels of a tensor that was written in place, and of all that share its storage."""
        before = self._labels.get(tensor)
        new = torch.zeros(()) if labels is None else labels
        new = compact(new.expand(tensor.shape).to(LABELS))
        if before is not None and _same(before, new):
            return
        place = tensor.untyped_storage().data_ptr()
        others = [t for ref in self._sharing[place] if (t := ref()) is not None and t is not tensor]
        others = [
            t for t in others if t in self._labels and t.untyped_storage().data_ptr() == place
        ]
        base = tensor._base  # no other way from a view to the tensor that has no labels yet
        if base is not None and base not in self._labels and base.dtype == tensor.dtype:
            others.append(base)
        if not others or all(_covers(tensor, t) for t in others):
            for t in (tensor, *others):
                self.put(t, new.as_strided(t.shape, new.stride()) if t.dim() == new.dim() else new)
            return
        shadow = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size())
        whole = [t for t in (*others, tensor) if 0 not in t.stride()]
        self.put(tensor, new)
        for t in whole:
            shadow.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(self.of(t))
        for t in others:
            self.put(t, shadow.as_strided(t.shape, t.stride(), t.storage_offset()).clone())


def tensor_ref(tensor: torch.Tensor) -> Any:
    """A weak reference to a tensor."""
    import weakref

    return weakref.ref(tensor)


def labelled(labels: torch.Tensor) -> bool:
    """Whether any element has a label."""
    return bool(_squeezed(labels).any())


def varies(labels: torch.Tensor, dim: int) -> bool:
    """Whether compact labels differ along a dimension."""
    return labels.shape[dim] > 1 and labels.stride(dim) != 0


def varied(labels: torch.Tensor) -> list[int]:
    """The dimensions along which compact labels differ."""
    return [dim for dim in range(labels.dim()) if varies(labels, dim)]


def compact(labels: torch.Tensor) -> torch.Tensor:
    """The same labels, expanded along each dimension where they are equal but for zeros (such as
    padding, which goes with its channel)."""
    shape = labels.shape
    labels = _squeezed(labels)
    for dim in range(labels.dim()):
        if labels.shape[dim] < 2:
            continue
        first, last = labels.narrow(dim, 0, 1), labels.narrow(dim, labels.shape[dim] - 1, 1)
        if bool(((first != last) & (first != 0) & (last != 0)).any()):  # most channels, at once
            continue
        if bool((labels == first).all()):
            labels = first
            continue
        high = labels.amax(dim, keepdim=True)
        if bool(((labels == high) | (labels == 0)).all()):
            labels = high
    return labels.expand(shape)


def _squeezed(labels: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Labels with size 1 along those of the dimensions from ``start`` where they are stored
    once."""
    for dim in range(start, labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _once(labels: torch.Tensor) -> torch.Tensor:
    """Each label other than 0, once."""
    found = _squeezed(labels)
    if found.numel() < MANY:
        found = found.unique().long()
        return found[found != 0]
    seen = torch.bincount(found.flatten().long())  # 10x as fast as unique
    seen[0] = 0
    return seen.nonzero().flatten()


def _distinct(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of one shape, without the places that both store once, flat."""
    for dim in range(a.dim()):
        if a.shape[dim] > 1 and a.stride(dim) == b.stride(dim) == 0:
            a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
    return a.reshape(-1), b.reshape(-1)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = _distinct(a, b)
    return torch.equal(a, b)


def _covers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage are the same elements in the same order."""
    return (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())


def _name(func: Any) -> str:
    """'add' for aten::add_.Tensor; the namespace stays for others than aten's operations."""
    namespace, _, name = func.name().partition(".")[0].partition("::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name if namespace == "aten" else f"{namespace}::{name}"


def elements(shape: Iterable[int]) -> int:
    """The number of elements of a shape."""
    return math.prod(shape)


def components(count: int, pairs: torch.Tensor) -> torch.Tensor:
    """The smallest label of the component of each of the labels 0 … ``count`` - 1, when the two
    labels of each of ``pairs`` (n, 2) belong together.

    >>> components(5, torch.tensor([[1, 3], [3, 4]])).tolist()
    [0, 1, 2, 1, 1]
    """
    roots = torch.arange(count)
    a, b = pairs.T.contiguous()
    while len(pairs):
        one, other = roots[a], roots[b]
        low = torch.minimum(one, other)
        merged = roots.scatter_reduce(0, one, low, "amin").scatter_reduce(0, other, low, "amin")
        while not torch.equal(merged, shorter := merged[merged]):
            merged = shorter
        if torch.equal(merged, roots):
            break
        roots = merged
    return roots


def pairs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The pairs (n, 2) of the elements of two tensors at equal places, each once.

    >>> pairs(torch.tensor([1, 1, 2]), torch.tensor([3, 3, 4])).tolist()
    [[1, 3], [2, 4]]
    """
    keys = ((a.long() << 32) | b.long()).flatten().unique()  # 20x as fast as unique(dim=0)
    return torch.stack([keys >> 32, keys & 0xFFFFFFFF], 1)
