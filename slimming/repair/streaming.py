"""Run a network over and over on the same batches, each time up to one layer.

Between two runs the weights of layers change, from the first to the last. What does not depend on
any layer that still changes is not computed again: calls of modules return what they returned
before, as far as `MEMORY` reaches. It holds the few maps that later layers read, not those of all.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from slimming.channels import inputs as arguments
from slimming.channels.inputs import Inputs
from slimming.channels.recording import Key, Recording, is_sum

FEWEST = 32  # images
MEMORY = 3 * 2**29  # bytes of what modules returned
Take = Callable[[int, torch.Tensor], torch.Tensor]  # (number of the call, a tensor) -> what to keep


class Stopped(Exception):
    """Ends a forward pass where enough is known."""


class Sums(TorchDispatchMode):
    """Calls ``added(known, other, total)`` for each sum with a term whose id is in ``terms``, which
    says what is ``known`` of it."""

    def __init__(
        self, terms: dict[int, Any], added: Callable[[Any, torch.Tensor, torch.Tensor], None]
    ):
        super().__init__()
        self.terms, self.added = terms, added

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_sum(func, args, kwargs):
            return func(*args, **kwargs)
        for term, other in (args[:2], args[1::-1]):
            if id(term) in self.terms:
                known = self.terms.pop(id(term))
                kept = other.clone()
                total = func(*args, **kwargs)
                self.added(known, kept, total)
                return total
        return func(*args, **kwargs)


class Stream:
    """``model``, in eval mode, on ``batches``; ``recording``: of one run of it. It ``resumes``
    unless modules write into what they read, which a later reader would miss."""

    def __init__(self, model: nn.Module, batches: list[Inputs], recording: Recording):
        self.model, self.batches, self.recording = model, batches, recording
        self.known: list[dict[Key, Any]] = [{} for _ in batches]
        self.room = MEMORY
        inner: dict[int, list[Key]] = {}
        for call in recording.calls:
            for outer in recording.around(call.parent):
                inner.setdefault(outer, []).append(call.key)
        self.numbers = {call.key: number for number, call in enumerate(recording.calls)}
        self.inner = {key: inner.get(number, []) for key, number in self.numbers.items()}
        self.settled: set[Key] = set()
        self.resumes = not any(call.overwrites for call in recording.calls)

    def settle(self, pending: int) -> None:
        """From now on no layers but those of ``pending`` (bits) change."""
        self.settled = {
            call.key for call in self.recording.calls if call.writes and not call.behind & pending
        }

    def taken(self, b: int, name: str, take: Take, before: bool = True) -> list[torch.Tensor]:
        """What ``take`` keeps of what each call of a module reads (or, not ``before``, returns) for
        the batch ``b``; the last one ends the run."""
        calls = len(self.recording.calls_of(name))

        def run(found: list[torch.Tensor]) -> None:
            def look(tensor: torch.Tensor) -> None:
                found.append(take(len(found), tensor))
                if len(found) == calls:
                    raise Stopped

            with _seen(self.model.get_submodule(name), look, before):
                arguments.call(self.model, arguments.mapped(self.batches[b], torch.clone))

        return self._run(b, run)

    def taken_and_other_term(
        self, b: int, name: str, term: str, take: Take, take_other: Take
    ) -> list[torch.Tensor]:
        """What ``take`` keeps of what the only call of ``name`` reads for the batch ``b``, and
        ``take_other`` of what is added to the output of the module ``term`` later on."""

        def run(found: list[torch.Tensor]) -> None:
            def added(_: torch.Tensor, other: torch.Tensor, __: torch.Tensor) -> None:
                found.append(take_other(0, other))
                raise Stopped

            terms: dict[int, torch.Tensor] = {}
            module, last = self.model.get_submodule(name), self.model.get_submodule(term)
            with (
                _seen(module, lambda read: found.append(take(0, read)), True),
                _seen(last, lambda out: terms.update({id(out): out}), False),
                Sums(terms, added),
            ):
                arguments.call(self.model, arguments.mapped(self.batches[b], torch.clone))

        return self._run(b, run)

    def _run(self, b: int, run: Callable[[list[torch.Tensor]], None]) -> list[torch.Tensor]:
        """What one run finds; it starts over from the images if what was known does not suffice, as
        where the flow of control depends on the images."""
        for resume in (True, False) if self.resumes else (False,):
            found: list[torch.Tensor] = []
            try:
                with self._resumed(b) if resume else contextlib.nullcontext():
                    run(found)
            except Stopped:
                pass
            except Exception:
                if not resume:
                    raise
                continue
            if not resume or all(bool(values.isfinite().all()) for values in found):
                break
        if resume:
            self._forget(b)
        else:
            self._free(b, list(self.known[b]))
        return found

    @contextlib.contextmanager
    def _resumed(self, b: int) -> Iterator[None]:
        """Inside the context, calls that are settled return what they returned before."""
        known, count = self.known[b], Counter[str]()
        inside = False

        def resumed(name: str, forward: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                key = Key(name, count[name])
                count[name] += 1
                if key in known:
                    count.update(inner.name for inner in self.inner[key])
                    return tree_map(_copied, known[key])
                first = not inside and key in self.settled
                inside |= first
                try:
                    out = forward(*args, **kwargs)
                finally:
                    inside &= not first
                if first:
                    self._keep(b, key, out)
                return out

            return call

        before: dict[nn.Module, Any] = {}
        for name, module in self.model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                before[module] = vars(module).get("forward")
                vars(module)["forward"] = resumed(name, module.forward)
        try:
            yield
        finally:
            for module, own in before.items():
                if own is None:
                    del vars(module)["forward"]
                else:
                    vars(module)["forward"] = own

    def _keep(self, b: int, key: Key, out: Any) -> None:
        size = _size(out)
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if size <= self.room and len(leaves) == len(arguments.tensors(out)):
            self.room -= size
            self._free(b, self.inner[key])
            self.known[b][key] = tree_map(_copied, out)

    def _free(self, b: int, keys: list[Key]) -> None:
        for key in keys:
            if key in self.known[b]:
                self.room += _size(self.known[b].pop(key))

    def _forget(self, b: int) -> None:
        """Of what only calls read that are not computed again nothing but the shape stays."""
        known = self.known[b]
        done = {self.numbers[key] for key in known}
        for key, out in known.items():
            if not (size := _size(out)):
                continue
            readers = {
                reader
                for value in self.recording.calls[self.numbers[key]].writes
                for reader in self.recording.readers[value]
            }
            if all(done.intersection(self.recording.around(reader)) for reader in readers):
                known[key] = tree_map(_shape, out)
                self.room += size


@contextlib.contextmanager
def _seen(module: nn.Module, look: Callable[[torch.Tensor], None], before: bool) -> Iterator[None]:
    """Inside the context ``look`` gets what a module reads, or what it returns."""
    if before:
        hook = module.register_forward_pre_hook(
            lambda _, args, kwargs: look(arguments.tensors((args, kwargs))[0]), with_kwargs=True
        )
    else:
        hook = module.register_forward_hook(lambda _, __, out: look(out))
    try:
        yield
    finally:
        hook.remove()


def _copied(value: Any) -> Any:
    """A tensor that may be written in place; shapes alone are shared."""
    if not isinstance(value, torch.Tensor) or not _size(value):
        return value
    return value.clone()


def _shape(value: Any) -> Any:
    """A tensor of the same shape that takes no memory; who reads it after all reads nan."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.new_full((), torch.nan).expand(value.shape)


def _size(value: Any) -> int:
    """The bytes of the tensors in what a module returned, but for those that are shapes alone."""
    found = [t for t in arguments.tensors(value) if t.dim() and any(t.stride())]
    return sum(t.nbytes for t in found)
