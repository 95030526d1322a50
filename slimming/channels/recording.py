"""One run of a network, recorded: which module calls read and write which values.

No graph is built and nothing is traced symbolically, so any network can be recorded that runs. A
value is what a tensor holds until it is written in place; then it holds another.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # the only way to see every operation
from torch.utils._pytree import tree_leaves

from slimming.channels import inputs as arguments
from slimming.channels.inputs import Inputs

ROOT = -1  # in place of the number of a call: what runs in no module but the network itself


class Key(NamedTuple):
    """The call number ``number`` of the module ``name``: those of each module count from 0."""

    name: str
    number: int


@dataclass
class Call:
    """A call of a module: its ``parent`` is the number of the call that it runs in, or `ROOT`.

    ``reads`` and ``writes``: the values of the tensors among its arguments and in what it returned;
    ``before`` and ``behind``: the layers, as a set of bits, that its arguments and what it returned
    depend on; ``time``: how many operations ran before it; ``overwrites``: whether it changed one
    of its arguments in place.
    """

    key: Key
    parent: int
    time: int
    reads: list[int]
    before: int
    writes: list[int] = field(default_factory=list)
    behind: int = 0
    overwrites: bool = False


class Sum(NamedTuple):
    """Two values of the same shape were added: when, and how many operations ran before."""

    terms: tuple[int, int]
    time: int


class Recording(TorchDispatchMode):
    """What happened in one run of ``model``, in the mode that it is in.

    ``calls``, in the order in which they began; ``readers``: for each value the number of the
    innermost call in which each operation that reads it runs; ``sums``; ``upstream``: the layers
    that a value depends on; ``bits``: the bit of each layer in such sets; ``tensors``: the values
    of the parameters and buffers of each module, by its name.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]):
        super().__init__()
        self.bits = {name: 1 << place for place, name in enumerate(layers)}
        self.calls: list[Call] = []
        self.readers: dict[int, list[int]] = defaultdict(list)
        self.sums: list[Sum] = []
        self.upstream: dict[int, int] = {}
        self.tensors: dict[str, list[int]] = {}
        self._time = 0
        self._values: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # so that no two tensors have one id
        self._depends: dict[int, int] = defaultdict(int)  # storage -> layers
        self._stack: list[int] = []
        self._count: Counter[str] = Counter()
        self._model = model

    def run(self, inputs: Inputs) -> "Recording":
        """Record what the network does with ``inputs``."""
        for name, module in self._model.named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            self.tensors[name] = [self.value(tensor) for tensor in own]
        with torch.no_grad(), self._hooked(), self:
            outputs = arguments.call(self._model, inputs)
        for tensor in arguments.tensors(outputs):
            self.readers[self.value(tensor)].append(ROOT)
        self._alive.clear()
        self._values.clear()
        return self

    def value(self, tensor: torch.Tensor) -> int:
        """The number of what a tensor holds now."""
        if id(tensor) not in self._values:
            self._new(tensor)
        return self._values[id(tensor)]

    def calls_of(self, name: str) -> list[Call]:
        """The calls of a module."""
        return [call for call in self.calls if call.key.name == name]

    def around(self, call: int) -> Iterator[int]:
        """A call and those that it runs in, by number, the innermost first."""
        while call != ROOT:
            yield call
            call = self.calls[call].parent

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        values = [self.value(t) for t in read]
        layers = 0
        for tensor in read:
            layers |= self._depends[_storage(tensor)]
        before = [t._version for t in read]
        out = func(*args, **kwargs)
        inside = self._stack[-1] if self._stack else ROOT
        for value in values:
            self.readers[value].append(inside)
        for tensor, version in zip(read, before, strict=True):
            if tensor._version != version:
                self._depends[_storage(tensor)] |= layers
                self._new(tensor)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not any(tensor is t for t in read):
                self._depends[_storage(tensor)] |= layers
                self._new(tensor)
        if is_sum(func, args, kwargs):
            self.sums.append(Sum((values[0], values[1]), self._time))
        self._time += 1
        return out

    def _new(self, tensor: torch.Tensor) -> None:
        """A tensor holds something that it did not before."""
        if id(tensor) not in self._values:
            self._alive.append(tensor)
        self._values[id(tensor)] = value = len(self.upstream)
        self.upstream[value] = self._depends[_storage(tensor)]

    def _layers(self, tensors: list[torch.Tensor]) -> int:
        layers = 0
        for tensor in tensors:
            layers |= self._depends[_storage(tensor)]
        return layers

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Inside the context, calls of modules are recorded."""
        given: dict[int, list[tuple[torch.Tensor, int]]] = {}

        def enter(name: str, args: tuple, kwargs: dict) -> None:
            tensors = arguments.tensors((args, kwargs))
            parent = self._stack[-1] if self._stack else ROOT
            values = [self.value(t) for t in tensors]
            key = Key(name, self._count[name])
            self._count[name] += 1
            number = len(self.calls)
            self.calls.append(Call(key, parent, self._time, values, self._layers(tensors)))
            given[number] = [(t, t._version) for t in tensors]
            self._stack.append(number)

        def leave(name: str, out: Any) -> None:
            number = self._stack.pop()
            call, tensors = self.calls[number], arguments.tensors(out)
            for tensor in tensors:
                self._depends[_storage(tensor)] |= self.bits.get(name, 0)
                self.upstream[self.value(tensor)] = self._depends[_storage(tensor)]
            call.writes = [self.value(t) for t in tensors]
            call.behind = self._layers(tensors)
            call.overwrites = any(t._version != version for t, version in given.pop(number))

        hooks: list[Any] = []
        for name, module in self._model.named_modules():
            if not name:
                continue
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
                )
            )
            hooks.append(
                module.register_forward_hook(lambda _, __, out, name=name: leave(name, out))
            )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def is_sum(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether an operation adds two tensors of one shape, and weighs neither."""
    if func not in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) or kwargs:
        return False
    a, b = args[:2]
    return isinstance(b, torch.Tensor) and a.shape == b.shape


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
